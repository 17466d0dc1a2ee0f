"""Saved caches, full disks, refusals, and what the caches promise about sharing and memory."""

from __future__ import annotations

import errno
import gc
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longctx.plans import RetentionPlan
from longctx.plugins import register_plugin, registry, unregister_plugin
from longctx.protocols.kv_cache import KVCache
from longctx_models import plugin
from longctx_models.caches import ContiguousCache, PagedCache

KINDS = [ContiguousCache, PagedCache]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def filled(kind: Any, tokens: int = 100, **options: Any) -> Any:
    cache = kind(2, 1, 2, 4, **options)
    for layer in range(2):
        cache.append(layer, *pair(tokens, seed=layer, dtype=cache.sizes.dtype))
    return cache


def pair(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, tokens, 2, 4, generator=generator).to(dtype)
    return k, v


def keep(*slots: int) -> RetentionPlan:
    indices = torch.tensor(slots, dtype=torch.int32).expand(1, 2, -1)
    return RetentionPlan(indices, torch.full((1, 2), len(slots), dtype=torch.int32))


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size``: what a full disk looks like to a program."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_both_keep_the_protocol(kind: Any) -> None:
    assert isinstance(filled(kind), KVCache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reader", KINDS)
def test_either_reads_what_the_other_saved(
    kind: Any, reader: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    cache = filled(kind, dtype=dtype)
    cache.retain(1, keep(0, 5, 99))
    cache.auxiliary(1)["bounds"] = torch.arange(6).view(2, 3)
    cache.save(tmp_path / "cache")
    loaded = reader.load(tmp_path / "cache", capacity=200)
    assert (loaded.physical_length(0), loaded.physical_length(1)) == (100, 3)
    assert loaded.logical_length() == 100
    for layer in range(2):
        for ours, theirs in zip(cache.gather(layer), loaded.gather(layer), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(loaded.auxiliary(1)["bounds"], cache.auxiliary(1)["bounds"])
    # the eviction is remembered
    loaded.mark()
    with pytest.raises(ValueError, match="before the eviction"):
        loaded.rollback(50)


def test_the_file_is_plain_safetensors(kind: Any, tmp_path: Path) -> None:
    cache = filled(kind)
    cache.save(tmp_path / "cache.safetensors")
    tensors = load_file(tmp_path / "cache.safetensors")
    assert torch.equal(tensors["layers.1.k"], cache.gather(1)[0])
    assert set(tensors) == {f"layers.{n}.{part}" for n in range(2) for part in "kv"}


def test_a_full_disk_leaves_nothing_behind(kind: Any, tmp_path: Path) -> None:
    cache = filled(kind, 1000)
    with (
        disk_of(20_000),
        pytest.raises(OSError, match=r"could not be saved.*nothing was left") as e,
    ):
        cache.save(tmp_path / "cache")
    assert e.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
    cache.save(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    longer = filled(kind, 1500)
    with disk_of(20_000), pytest.raises(OSError, match="could not be saved"):
        longer.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_unwritable_places_are_named(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be saved"):
        filled(kind).save(tmp_path / "missing" / "cache")


def test_bad_files_are_named(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no saved cache"):
        kind.load(tmp_path / "cache")
    filled(kind).save(tmp_path / "cache")
    data = (tmp_path / "cache").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut is damaged or no safetensors file"):
        kind.load(tmp_path / "cut")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights holds no saved cache"):
        kind.load(tmp_path / "weights")


def test_wrong_tensors_are_refused_and_store_nothing(kind: Any) -> None:
    cache = filled(kind, 10)
    k, v = pair(3)
    for bad in (
        (k[:, :, :1], v),
        (k, v[:, :2]),
        (k.double(), v.double()),
        (k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)),
        (k.to("meta"), v.to("meta")),
    ):
        with pytest.raises(ValueError, match="must be"):
            cache.append(0, *bad)
    assert cache.physical_length(0) == 10


def test_limits_are_kept_and_nothing_is_stored() -> None:
    contiguous = filled(ContiguousCache, 10, max_tokens=12)
    with pytest.raises(ValueError, match="no room in layer 0: 13 tokens"):
        contiguous.append(0, *pair(3))
    contiguous.append(0, *pair(2))
    paged = filled(PagedCache, 10, page_size=4, max_pages=4)
    with pytest.raises(ValueError, match="no room: 5 pages"):
        paged.append(0, *pair(7))
    assert paged.physical_length(0) == 10
    fork = paged.fork()
    fork.append(0, *pair(2))  # the fourth page is a copy of the one that both had begun
    with pytest.raises(ValueError, match="no room: 5 pages"):
        paged.append(0, *pair(3))
    assert torch.equal(paged.gather(0)[0], pair(10)[0])
    del fork
    gc.collect()
    paged.append(0, *pair(6))
    with pytest.raises(ValueError, match="needs 2 pages"):
        PagedCache(1, 1, 1, 4, capacity=20, page_size=16, max_pages=1)


def test_ragged_retention_is_refused(kind: Any) -> None:
    cache = filled(kind, 10)
    indices = torch.tensor([[[0, 1, 2], [0, 1, -1]]], dtype=torch.int32)
    plan = RetentionPlan(indices, torch.tensor([[3, 2]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"counts from 2 to 3: pad"):
        cache.retain(0, plan)
    for slots in ((0, 0), (3, 2), (0, 10), (-1, 2)):
        with pytest.raises(ValueError, match="slots to keep must ascend within the 10"):
            cache.retain(0, keep(*slots))
    two = RetentionPlan(torch.zeros(2, 2, 1, dtype=torch.int32), torch.ones(2, 2).int())
    with pytest.raises(ValueError, match="made for batch 2"):
        cache.retain(0, two)
    assert cache.physical_length(0) == 10


def test_bad_sizes_are_refused(kind: Any) -> None:
    for sizes in ((0, 1, 1, 4), (1, 0, 1, 4), (1, 1, 0, 4), (1, 1, 1, 0)):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            kind(*sizes)
    with pytest.raises(ValueError, match="capacity must be at least 0"):
        kind(1, 1, 1, 4, capacity=-1)


def test_eviction_gives_memory_back(kind: Any) -> None:
    cache = filled(kind, 10_000)
    before = cache.nbytes()
    for layer in range(2):
        cache.retain(layer, keep(*range(9_900, 10_000)))
    assert cache.nbytes() < before / 20


def test_reserved_capacity_is_not_moved() -> None:
    cache = ContiguousCache(1, 1, 2, 4, capacity=500)
    where = cache.view(0).k.data_ptr()
    for _ in range(5):
        cache.append(0, *pair(100))
    assert cache.view(0).k.data_ptr() == where == cache.gather(0)[0].data_ptr()


def test_a_context_asked_again_and_again_is_not_copied() -> None:
    context = ContiguousCache(2, 1, 2, 4, capacity=200)
    for layer in range(2):
        context.append(layer, *pair(100))
    where = context.view(0).k.data_ptr()
    for _ in range(3):
        question = context.fork()
        for layer in range(2):
            question.append(layer, *pair(20))
        assert question.view(0).k.data_ptr() == where
        del question


def test_forks_of_pages_share_the_full_ones() -> None:
    context = filled(PagedCache, 100, page_size=16)
    fork = context.fork()
    fork.append(0, *pair(1, seed=9))
    ours, theirs = context.view(0).page_table, fork.view(0).page_table
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours[:, :6], theirs[:, :6])
    assert ours[0, 6] != theirs[0, 6]
    assert torch.equal(context.gather(0)[0], pair(100)[0])


def test_a_cache_made_under_inference_mode_is_written_outside_it(kind: Any) -> None:
    with torch.inference_mode():
        cache = filled(kind, 10)
    fork = cache.fork()
    fork.append(0, *pair(200))
    cache.append(0, *pair(2))
    assert (cache.physical_length(0), fork.physical_length(0)) == (12, 210)


def test_offloading_to_the_same_device_does_nothing(kind: Any) -> None:
    cache = filled(kind)
    where = cache.view(0).k.data_ptr()
    cache.offload("cpu")
    assert cache.view(0).k.data_ptr() == where


def test_offloading_moves_everything(kind: Any) -> None:
    cache = filled(kind)
    cache.auxiliary(0)["x"] = torch.ones(3)
    fork = cache.fork()
    cache.offload("meta")
    assert {t.device.type for t in (*cache.gather(0), cache.view(1).seqlens)} == {"meta"}
    assert cache.auxiliary(0)["x"].device.type == "meta"
    assert torch.equal(fork.gather(1)[0], pair(100, seed=1)[0])
    cache.append(0, *(t.to("meta") for t in pair(3)))
    assert cache.physical_length(0) == 103


def test_caches_and_selectors_are_plugins() -> None:
    present = registry().kv_caches
    if "paged" not in present:
        register_plugin(plugin)
    try:
        assert registry().kv_caches["paged"].load() is PagedCache
        assert registry().kv_caches["contiguous"].load() is ContiguousCache
        assert registry().selectors["window"].load()(window=4).window == 4
        assert not [f for f in registry().failures if "longctx_models" in f.source]
    finally:
        unregister_plugin(plugin)
