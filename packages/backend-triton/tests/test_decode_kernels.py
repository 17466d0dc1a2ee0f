"""Decode and merge kernels against the fp64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from longctx.reference import decode as oracle
from longctx.testing.budget import assert_within_budget
from longctx_triton import decode
from longctx_triton.launch import decode_plan as launch_plan
from longctx_triton.launch.decode_plan import decode_plan
from longctx_triton.launch.decode_splits import Split, split_keys

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fill what ``torch.empty`` returns with NaN, and draw the same numbers every time."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["whole", "merged", "merged apart"])
def splits(request, monkeypatch):
    """Run unsplit, and with more splits than some sequences have blocks."""
    number = 1 if request.param == "whole" else 3
    monkeypatch.setattr(launch_plan, "split_keys", lambda *_: Split(number, 1))
    monkeypatch.setattr(launch_plan, "MERGED_BYTES", 0 if "apart" in request.param else 1 << 30)
    monkeypatch.setattr(launch_plan, "MERGED_NUMBERS", 256)
    decode_plan.cache_clear()
    yield number
    decode_plan.cache_clear()


def cache(lengths, capacity, page_size, kv_heads, head_dim, value_dim, dtype):
    """Return k, v and a page table; unused slots hold NaN, unused table entries nonsense."""
    batch = len(lengths)
    if page_size is None:
        table, shape = None, (batch, capacity)
    else:
        pages = -(-capacity // page_size)
        shape = (batch * pages + 3, page_size)
        table = torch.randperm(shape[0])[: batch * pages].view(batch, pages).int()
    used = torch.zeros(shape, dtype=torch.bool)
    for b, length in enumerate(lengths):
        slots = torch.arange(length)
        if table is None:
            used[b, :length] = True
        else:
            used[table[b][slots // page_size].long(), slots % page_size] = True
            table[b, -(-length // page_size) :] = -1 if b % 2 else 10**6
    caches = []
    for dim in (head_dim, value_dim):
        filled = torch.randn(*shape, kv_heads, dim)
        caches.append(filled.masked_fill(~used[..., None, None], math.nan).to(dtype))
    return *caches, table


def options(**given):
    defaults = dict.fromkeys(("page_table", "window_left", "sinks", "k_scale", "v_scale"))
    return {**defaults, "softcap": 0.0, "scale": 0.3, **given}


def expected(q, k, v, lengths, dtype, *, window_left, page_table, **given):
    """Return the oracle's result with the arithmetic of ``dtype``."""
    table = None if page_table is None else page_table.clamp(0, k.shape[0] - 1)
    return oracle.decode_attention(
        q.to(dtype),
        *(t.cpu().float().to(dtype).nan_to_num() for t in (k, v)),
        cache_seqlens=lengths,
        page_table=table,
        window=None if window_left is None else (window_left, 0),
        **given,
    )


def check(device, q, k, v, lengths, **given):
    """Run the kernel and hold it against the oracle; return its result."""
    given = options(**given)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    exact = expected(q, k, v, lengths, torch.float64, **given)
    rough = expected(q, k, v, lengths, q.dtype, **given)
    moved = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    out, lse = decode.decode_forward(
        *(t.to(device) for t in (q, k, v)), cache_seqlens=lengths.to(device), **moved
    )
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert_within_budget(out, exact[0], rough[0], name="out")
    finite = exact[1].isfinite()
    torch.testing.assert_close(lse.cpu().double()[finite], exact[1][finite], atol=2e-5, rtol=1e-5)
    assert torch.equal(lse.cpu()[~finite].double(), exact[1][~finite])
    return out, lse


# lengths, capacity, q_len, q_heads, kv_heads, head_dim, value_dim
CASES = [
    ([1], 1, 1, 1, 1, 64, 64),
    ([63, 7], 65, 1, 8, 2, 64, 64),
    ([40, 33], 40, 3, 4, 4, 128, 128),
    ([3, 49], 50, 16, 4, 1, 16, 16),
    ([17, 90], 97, 2, 6, 2, 80, 48),
    ([21], 40, 1, 3, 1, 256, 256),
]


@pytest.mark.parametrize("page_size", [None, 1, 5, 16, 64])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(device, case, page_size, splits):
    lengths, capacity, q_len, heads, kv_heads, head_dim, value_dim = case
    q = torch.randn(len(lengths), q_len, heads, head_dim).to(BF16)
    k, v, table = cache(lengths, capacity, page_size, kv_heads, head_dim, value_dim, BF16)
    check(device, q, k, v, lengths, page_table=table)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "given",
    [
        {"window_left": 0},
        {"window_left": 20},
        {"window_left": 2**40},
        {"softcap": 2.0},
        {"sinks": True},
        {"sinks": True, "softcap": 1.5, "window_left": 30, "scale": -0.5},
    ],
    ids=str,
)
def test_options(device, dtype, given, splits):
    q = torch.randn(2, 3, 4, 64).to(dtype)
    k, v, table = cache([59, 4], 64, 16, 2, 64, 64, dtype)
    if "sinks" in given:
        given = {**given, "sinks": torch.randn(4) * 3}
    check(device, q, k, v, [59, 4], page_table=table, **given)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("mode", ["native", "bits"])
def test_fp8_cache(device, dtype, page_size, mode, splits, monkeypatch):
    if device.type == "cuda" and mode != "bits" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no e4m3 conversion")
    monkeypatch.setattr(launch_plan, "_fp8_mode", lambda *_: mode)
    q = torch.randn(2, 2, 4, 64).to(dtype) * torch.tensor([1e-3, 30.0]).view(2, 1, 1, 1).to(dtype)
    k, v, table = cache([70, 9], 80, page_size, 2, 64, 64, FP8)
    scales = {name: torch.rand(2, 2) + 0.5 for name in ("k_scale", "v_scale")}
    check(device, q, k, v, [70, 9], page_table=table, sinks=torch.randn(4), **scales)
    check(device, q, k, v, [70, 9], page_table=table)


def test_every_e4m3_value(device, monkeypatch):
    # one key a sequence: the output is its value
    values = torch.arange(256, dtype=torch.uint8).view(FP8).view(16, 1, 1, 16)
    q = torch.ones(16, 1, 1, 16, dtype=BF16)
    ones = torch.ones(16, dtype=torch.int32, device=device)
    k, v = (t.to(device) for t in (torch.ones_like(values.float()).to(FP8), values))
    known = decode.device_of(device)
    for arch in {(8, 0), known.arch} - {(0, 0)}:  # the interpreter's own conversion knows no NaN
        monkeypatch.setattr(decode, "device_of", lambda _, a=arch: known._replace(arch=a))
        out, _ = decode.decode_forward(q.to(device), k, v, cache_seqlens=ones, **options())
        exact = values.to(BF16)
        torch.testing.assert_close(out.cpu(), exact, equal_nan=True, rtol=0, atol=0)


def test_rows_without_keys(device, splits):
    q = torch.randn(2, 3, 2, 64).to(BF16)
    k, v, _ = cache([0, 2], 70, None, 1, 64, 64, BF16)
    out, lse = check(device, q, k, v, [0, 2])
    assert torch.equal(out[0].cpu(), torch.zeros(3, 2, 64, dtype=BF16))
    assert (lse[0] == -torch.inf).all()
    assert (lse[1, :, 0] == -torch.inf).all()
    _, lse = check(device, q, k, v, [0, 2], sinks=torch.tensor([0.5, -1.0]))
    assert lse[0, :, 0].tolist() == pytest.approx([0.5, -1.0])


@pytest.mark.parametrize("number", [2, 5, 13])
@pytest.mark.parametrize("held", [64, 256])
def test_parts_are_merged_in_steps(device, number, held, monkeypatch):
    """More parts than are merged at a time, and a last step that is not full."""
    monkeypatch.setattr(launch_plan, "split_keys", lambda *_: Split(number, 1))
    monkeypatch.setattr(launch_plan, "MERGED_BYTES", 1 << 30)
    monkeypatch.setattr(launch_plan, "MERGED_NUMBERS", held)
    decode_plan.cache_clear()
    q = torch.randn(3, 2, 6, 48).to(BF16)
    k, v, table = cache([209, 0, 40], 220, 16, 2, 48, 48, BF16)
    check(device, q, k, v, [209, 0, 40], page_table=table, sinks=torch.randn(6))
    decode_plan.cache_clear()


def test_strided_tensors(device, splits):
    fused = torch.randn(2, 2, 7, 64).to(BF16)  # q is a slice of a fused projection
    kv = torch.randn(2, 4, 50, 128).to(BF16)  # head-major cache, keys and values interleaved
    k, v = kv.transpose(1, 2).split(64, -1)
    check(device, fused[:, :, 1:5], k[:, :, ::2], v[:, :, ::2], [50, 31])


def test_lengths_are_not_read_on_the_host(device, splits):
    """The same grid serves other lengths, as a replayed CUDA graph does."""
    q = torch.randn(2, 1, 4, 64).to(BF16)
    k, v, _ = cache([64, 64], 64, None, 2, 64, 64, BF16)
    for lengths in ([64, 64], [1, 50], [17, 16]):
        check(device, q, k, v, lengths)


def test_no_batch(device):
    q = torch.randn(0, 1, 4, 64, dtype=BF16, device=device)
    k = torch.randn(0, 9, 2, 64, dtype=BF16, device=device)
    lengths = torch.zeros(0, dtype=torch.int32, device=device)
    out, lse = decode.decode_forward(q, k, k, cache_seqlens=lengths, **options())
    assert (out.shape, lse.shape) == ((0, 1, 4, 64), (0, 4, 1))


@pytest.mark.parametrize("units", [1, 8, 64, 300])
@pytest.mark.parametrize("blocks", [1, 7, 64, 2048, 16384, 10**6])
def test_division(units, blocks):
    splits, least = split_keys(units, blocks, 264)
    assert 1 <= splits <= max(1, min(blocks, 256))
    assert 1 <= least <= 16
    if blocks > 128 and splits < 256:  # no program walks far while others are done
        assert -(-blocks // splits) <= 128
    if units == 8 and blocks == 2048:  # 8 KV heads over 128K tokens fill an H100 once
        assert 0.9 * 264 <= units * splits <= 264


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (3, 2, 5, 3, 64), (7, 1, 9, 2, 80)])
def test_merge(device, dtype, shape):
    parts, batch, q_len, heads, _ = shape
    outs = torch.randn(shape).to(dtype)
    lses = torch.randn(parts, batch, heads, q_len) * 4
    lses[parts // 2, 0] = -torch.inf  # an empty part may hold anything
    outs[parts // 2, 0] = math.nan
    lses[:, -1, -1, -1] = -torch.inf  # a row without keys anywhere
    exact = oracle.merge_attention(outs.double(), lses.double())
    rough = oracle.merge_attention(outs, lses.to(dtype))
    out, lse = decode.merge_forward(outs.to(device), lses.to(device))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_within_budget(out, exact[0], rough[0], name="out")
    torch.testing.assert_close(lse.cpu().double(), exact[1], atol=1e-5, rtol=1e-6)
    assert out[-1, -1, -1].abs().max() == 0


def test_merge_of_strided_and_far_apart_parts(device):
    outs = torch.randn(2, 3, 2, 4, 96)[..., :64].transpose(2, 3)
    lses = torch.tensor([500.0, -500.0]).view(2, 1, 1, 1) + torch.zeros(2, 3, 2, 4)
    out, lse = decode.merge_forward(outs.to(device), lses.to(device))
    torch.testing.assert_close(out.cpu(), outs[0].contiguous(), rtol=1e-6, atol=1e-7)
    assert lse.unique().tolist() == [500.0]


def test_merge_of_halves_is_the_whole(device):
    q = torch.randn(2, 1, 4, 64).to(BF16)
    k, v, _ = cache([48, 48], 48, None, 2, 64, 64, BF16)
    parts = [
        decode.decode_forward(
            *(t.to(device) for t in (q, k[:, keys], v[:, keys])),
            cache_seqlens=torch.full((2,), 24, dtype=torch.int32, device=device),
            **options(),
        )
        for keys in (slice(0, 24), slice(24, 48))
    ]
    outs, lses = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    merged, lse = decode.merge_forward(outs, lses)
    whole, whole_lse = check(device, q, k, v, [48, 48])
    torch.testing.assert_close(merged, whole, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, whole_lse)


def far_apart(shape, axis, device):
    """Return random bf16 values of ``shape``, whose ``axis`` spans more than 2**31 elements."""
    inner = torch.Size(shape[:axis] + shape[axis + 1 :])
    step = 2**31 // (shape[axis] - 1) // 16 * 16 + 16
    torch.use_deterministic_algorithms(False)  # which would write to all of it
    memory = torch.empty(step * (shape[axis] - 1) + inner.numel(), dtype=BF16, device=device)
    strides = list(torch.empty(inner, device="meta").stride())
    strides.insert(axis, step)
    return memory.as_strided(shape, strides).copy_(torch.randn(shape))


@pytest.mark.parametrize(("shape", "axis"), [((3, 20, 1, 16), 0), ((1, 40, 1, 16), 1)])
def test_offsets_beyond_31_bits(device, shape, axis, splits):
    k, v = (far_apart(shape, axis, device) for _ in range(2))
    q = torch.randn(shape[0], 1, 2, 16).to(BF16)
    check(device, q, k, v, [shape[1]] * shape[0])
    if axis == 0:  # the same memory as pages of 20 slots, the last one first
        table = torch.tensor([[2, 0]], dtype=torch.int32)
        check(device, q[:1], k, v, [37], page_table=table)
