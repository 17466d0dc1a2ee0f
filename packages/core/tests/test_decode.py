"""Decode: against hand-computed numbers, the fp64 oracle, flash and PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import longctx
from longctx.reference import decode as oracle
from longctx.reference import flash as flash_oracle
from longctx.torch_backend import _decode_device, _decode_host, _decode_splits
from longctx.torch_backend import decode as backend

FP8 = torch.float8_e4m3fn
INF = torch.inf
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2.5e-3,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["host", "device", "splits"])
def place(request, monkeypatch):
    """Run with lengths read on the host, and as on devices whose lengths are never read."""
    on_device = _decode_device.decode_on_device

    def split_if_possible(rows, k_cache, v_cache, *rest, softcap, **options):
        joined = all(t.stride(0) == t.shape[1] * t.stride(1) for t in (k_cache, v_cache))
        fits = k_cache.dtype == rows.dtype and rows.shape[3] == v_cache.shape[3]
        run = _decode_splits.decode_in_splits if joined and fits and not softcap else on_device
        return run(rows, k_cache, v_cache, *rest, softcap=softcap, **options)

    if request.param == "device":
        monkeypatch.setattr(backend, "decode_on_host", on_device)
    elif request.param == "splits":
        monkeypatch.setattr(_decode_splits, "flash_kernel", packed_kernel)
        monkeypatch.setattr(_decode_splits, "_LEAST_SPLIT", 1)
        monkeypatch.setattr(backend, "decode_on_host", split_if_possible)
    return request.param


def packed_kernel(q, k, v, *, scale, cu_seqlens_q, cu_seqlens_k, used_k, longest, **window):
    """What CUDA's packed kernel computes: sequence i sees ``used_k[i]`` keys from its first on."""
    assert window == {"left": None, "right": None}
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = torch.full((1, q.shape[2], q.shape[1]), -INF)
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    ends = cu_seqlens_q.tolist()
    for i, used in enumerate(used_k.tolist()):
        assert ends[i + 1] - ends[i] == longest[0]
        assert used <= longest[1]
        assert 0 <= cu_seqlens_k[i] <= k.shape[1] - used
        if used:
            rows = slice(ends[i], ends[i + 1])
            keys = slice(cu_seqlens_k[i], cu_seqlens_k[i] + used)
            wide = (q[:, rows].double(), k[:, keys].double(), v[:, keys].double())
            out[:, rows], lse[:, :, rows] = flash_oracle.flash_attention(*wide, scale=scale)
    return out, lse


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def poisoned_cache(lengths, capacity, page_size, kv_heads, head_dim, value_dim, dtype):
    """Return k, v and a page table; unused slots hold NaN, unused entries nonsense."""
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
            used[table[b][slots // page_size], slots % page_size] = True
            table[b, -(-length // page_size) :] = -1 if b % 2 else 10**6
    caches = []
    for dim in (head_dim, value_dim):
        cache = torch.randn(*shape, kv_heads, dim)
        caches.append(cache.masked_fill(~used[..., None, None], math.nan).to(dtype))
    return *caches, table


def check(q, k, v, **options):
    """Run the op and hold it against the fp64 oracle; return its result."""
    out, lse = longctx.decode_attention_with_lse(q, k, v, **options)
    clean = [t.double().nan_to_num() for t in (k, v)]
    table = options.pop("page_table", None)
    if table is not None:
        table = table.clamp(0, k.shape[0] - 1)
    truth, truth_lse = oracle.decode_attention(q.double(), *clean, page_table=table, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    atol = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), truth, atol=atol, rtol=atol)
    atol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(q.dtype, 2e-4)
    torch.testing.assert_close(lse.double(), truth_lse.double(), atol=atol, rtol=atol)
    return out, lse


@pytest.mark.parametrize("implementation", ["op", "oracle"])
def test_hand_computed(implementation):
    """Keys 0, ln 3, ln 4 weigh 1, 3, 4; the second query sees all, the first the first two."""
    q = torch.ones(1, 2, 1, 1)
    k = torch.tensor([0.0, math.log(3), math.log(4), math.nan]).view(1, 4, 1, 1)
    v = torch.tensor([4.0, 8.0, 2.0, math.nan]).view(1, 4, 1, 1)
    run = longctx.decode_attention_with_lse if implementation == "op" else oracle.decode_attention
    out, lse = run(q, k, v, cache_seqlens=int32(3))
    torch.testing.assert_close(out.flatten(), torch.tensor([7.0, 4.5]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([4.0, 8.0]).log())
    # page 1 holds the first two keys, page 0 the third
    pages_k, pages_v = (t.view(2, 2, 1, 1).flip(0) for t in (k, v))
    sinks = torch.tensor([8.0]).log()
    out, lse = run(
        q,
        pages_k,
        pages_v,
        cache_seqlens=int32(3),
        page_table=int32(1, 0).view(1, 2),
        window=(1, 0),
        sinks=sinks,
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([28 / 12, 32 / 15]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([12.0, 15.0]).log())


# lengths, capacity, q_len, q_heads, kv_heads, head_dim, value_dim
CASES = [
    ([1], 1, 1, 1, 1, 8, 8),
    ([63, 7], 65, 1, 8, 2, 16, 16),
    ([40, 40, 40], 40, 16, 4, 4, 8, 8),
    ([3, 129], 129, 3, 4, 1, 16, 16),
    ([127, 255], 300, 4, 8, 8, 16, 8),
    ([16, 30], 32, 16, 2, 1, 8, 24),
    ([2500], 3000, 2, 8, 2, 16, 16),
]
FEATURES = {
    "dense": {},
    "window": {"window": (20, 0)},
    "window-narrow": {"window": (2, None)},
    "window-self": {"window": (0, 0)},
    "softcap": {"softcap": 1.5},
    "softcap-window": {"softcap": 3.0, "window": (50, 0), "scale": 0.7},
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("page_size", [None, 1, 7, 16, 1024])
@pytest.mark.parametrize("features", FEATURES)
def test_matches_the_oracle(case, page_size, features, place):
    lengths, capacity, q_len, q_heads, kv_heads, head_dim, value_dim = case
    q = torch.randn(len(lengths), q_len, q_heads, head_dim)
    k, v, table = poisoned_cache(
        lengths, capacity, page_size, kv_heads, head_dim, value_dim, q.dtype
    )
    options = FEATURES[features] | {"sinks": torch.randn(q_heads)}
    check(q, k, v, cache_seqlens=int32(*lengths), page_table=table, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=str)
@pytest.mark.parametrize("features", ["dense", "softcap-window"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_every_dtype(dtype, case, features, page_size, place):
    lengths, capacity, q_len, q_heads, kv_heads, head_dim, value_dim = case
    q = torch.randn(len(lengths), q_len, q_heads, head_dim).to(dtype)
    k, v, table = poisoned_cache(
        lengths, capacity, page_size, kv_heads, head_dim, value_dim, dtype
    )
    check(q, k, v, cache_seqlens=int32(*lengths), page_table=table, **FEATURES[features])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_fp8_cache(dtype, case, features, page_size, place):
    lengths, capacity, q_len, q_heads, kv_heads, head_dim, value_dim = case
    q = torch.randn(len(lengths), q_len, q_heads, head_dim).to(dtype)
    k, v, table = poisoned_cache(lengths, capacity, page_size, kv_heads, head_dim, value_dim, FP8)
    scales = {f"{name}_scale": torch.rand(len(lengths), kv_heads) * 2 + 0.1 for name in "kv"}
    lengths = int32(*lengths)
    check(q, k, v, cache_seqlens=lengths, page_table=table, **scales, **FEATURES[features])
    check(q, k, v, cache_seqlens=lengths, page_table=table, **FEATURES[features])


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_matches_torch_sdpa(kv_heads, place):
    q = torch.randn(3, 1, 8, 32)
    k, v = torch.randn(2, 3, 200, kv_heads, 32)
    theirs = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k[:, :129], v[:, :129])), enable_gqa=True
    ).transpose(1, 2)
    ours = longctx.decode_attention(q, k, v, cache_seqlens=int32(129, 129, 129))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, (9, 0)])
def test_equals_the_last_rows_of_flash(window, place):
    q, k, v = torch.randn(2, 65, 4, 16), torch.randn(2, 65, 2, 16), torch.randn(2, 65, 2, 16)
    whole = longctx.flash_attention_with_lse(q, k, v, causal=True, window=window)
    for q_len in (1, 2, 16):
        out, lse = longctx.decode_attention_with_lse(
            q[:, -q_len:], k, v, cache_seqlens=int32(65, 65), window=window
        )
        torch.testing.assert_close(out, whole.out[:, -q_len:], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(lse, whole.lse[:, :, -q_len:], atol=1e-5, rtol=1e-5)


def test_strided_caches_give_the_same(place):
    q, lengths = torch.randn(2, 3, 4, 16), int32(30, 21)
    k, v = torch.randn(2, 2, 40, 2, 16)
    plain = longctx.decode_attention(q, k, v, cache_seqlens=lengths)
    head_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    joint = torch.cat([k, v], 3).split(16, 3)
    larger = [F.pad(t, (0, 0, 0, 0, 0, 9))[:, :40] for t in (k, v)]
    for k_view, v_view in (head_major, joint, larger):
        out = longctx.decode_attention(q, k_view, v_view, cache_seqlens=lengths)
        torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-6)


def test_an_empty_batch(place):
    q, cache = torch.empty(0, 2, 4, 8), torch.empty(0, 5, 2, 8)
    out, lse = longctx.decode_attention_with_lse(q, cache, cache, cache_seqlens=int32())
    assert out.shape == (0, 2, 4, 8)
    assert lse.shape == (0, 4, 2)


@pytest.mark.parametrize("page_size", [None, 4])
def test_chunks_of_every_size(page_size, monkeypatch, place):
    """Pieces, copies and tiles so small that all of them are cut."""
    monkeypatch.setattr(_decode_host, "_PIECE", 8)
    monkeypatch.setattr(_decode_host, "_LEAST_COPY", 32)
    monkeypatch.setattr(_decode_host, "_COPY_BYTES", 1)
    monkeypatch.setattr(_decode_device, "BUDGET", 4000)
    lengths, q = [63, 40], torch.randn(2, 3, 4, 8)
    for dtype in (torch.float32, FP8):
        k, v, table = poisoned_cache(lengths, 80, page_size, 2, 8, 8, dtype)
        for options in FEATURES.values():
            check(q, k, v, cache_seqlens=int32(*lengths), page_table=table, **options)


def test_same_inputs_same_bits(place):
    q, k, v = torch.randn(2, 2, 8, 16), torch.randn(2, 99, 2, 16), torch.randn(2, 99, 2, 16)
    first, second = (
        longctx.decode_attention(q, k, v, cache_seqlens=int32(99, 70)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": (9000, 0)}, {"softcap": 2.0}, {"paged": True}, {"fp8": True}],
    ids=str,
)
@pytest.mark.parametrize("q_len", [1, 4])
def test_the_cache_is_neither_copied_nor_repeated(options, q_len):
    length, kv_heads, head_dim = 16384, 2, 64
    options = dict(options)
    q = torch.randn(1, q_len, 16, head_dim)
    k = torch.randn(1, length, kv_heads, head_dim)
    table = None
    if options.pop("paged", False):
        k = k.view(-1, 16, kv_heads, head_dim)
        table = torch.randperm(k.shape[0]).view(1, -1).int()
    if options.pop("fp8", False):
        k = k.to(FP8)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            given = {
                t.untyped_storage().data_ptr() for t in (*args, k) if isinstance(t, torch.Tensor)
            }
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return result

    with Watch():
        window = options.get("window", (None, None))
        backend.decode_forward(
            q, k, k, cache_seqlens=int32(length), page_table=table, window_left=window[0],
            softcap=options.get("softcap", 0.0), sinks=None, scale=0.1,
            k_scale=None, v_scale=None,
        )  # fmt: skip
    assert 0 < largest <= k.numel() // 4
