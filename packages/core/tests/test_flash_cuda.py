"""The torch backend's flash and decode primitives on a GPU: CUDA kernels, no host sync."""

from __future__ import annotations

import math

import pytest
import torch

from longctx.reference import decode as decode_oracle
from longctx.reference import flash as oracle
from longctx.torch_backend import decode, flash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FP8 = torch.float8_e4m3fn
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def attend(q, k, v, *, causal=False, window=None, softcap=0.0, sinks=None, ends=None, **descales):
    left, right = window or (None, None)
    none = {"q_descale": None, "k_descale": None, "v_descale": None}
    return flash.flash_forward(
        q, k, v, causal=causal, window_left=left, window_right=right, softcap=softcap, sinks=sinks,
        scale=q.shape[3] ** -0.5, cu_seqlens_q=ends, cu_seqlens_k=ends, **(none | descales),
    )  # fmt: skip


def close(got, truth, dtype):
    (out, lse), (out_truth, lse_truth) = got, truth
    assert out.is_contiguous()
    assert lse.is_contiguous()
    atol = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), out_truth.double(), atol=atol, rtol=atol)
    atol = max(atol / 50, 1e-4) if dtype != torch.float64 else atol
    torch.testing.assert_close(lse.double(), lse_truth.double(), atol=atol, rtol=1e-4)


# batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim
SHAPES = [
    (1, 1, 1, 1, 1, 64, 64),
    (2, 63, 65, 4, 1, 64, 64),
    (1, 129, 129, 8, 2, 128, 128),
    (3, 127, 255, 4, 4, 64, 32),
    (2, 65, 33, 6, 3, 24, 24),
    (2, 5, 0, 2, 1, 8, 8),
    (1, 300, 300, 2, 2, 256, 256),
    (1, 300, 300, 2, 2, 288, 288),
    (2, 40, 300, 8, 2, 192, 128),
    (1, 20, 30, 2, 1, 20, 20),
]
FEATURES = [
    {},
    {"causal": True},
    {"window": (20, 3)},
    {"window": (10, None)},
    {"window": (None, 7)},
    {"window": (5, 40)},
    {"window": (0, 0)},
    {"causal": True, "softcap": 2.0},
]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_flash(dtype, shape, features):
    batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim = shape
    q = normal(batch, q_len, q_heads, head_dim, dtype=dtype)
    k = normal(batch, k_len, kv_heads, head_dim, dtype=dtype)
    v = normal(batch, k_len, kv_heads, value_dim, dtype=dtype)
    sinks = normal(q_heads)
    truth = oracle.flash_attention(q.double(), k.double(), v.double(), sinks=sinks, **features)
    close(attend(q, k, v, sinks=sinks, **features), truth, dtype)


@DTYPES
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_packed(dtype, features):
    ends_q, ends_k = int32(0, 7, 7, 72, 80), int32(0, 9, 13, 40, 80)
    q = normal(1, 80, 8, 64, dtype=dtype)
    k, v = normal(2, 1, 80, 2, 64, dtype=dtype)
    left, right = features.get("window", (None, None))
    options = {
        "causal": features.get("causal", False),
        "window_left": left,
        "window_right": right,
        "softcap": features.get("softcap", 0.0),
        "sinks": None,
        "scale": 64**-0.5,
        "cu_seqlens_q": ends_q,
        "cu_seqlens_k": ends_k,
    }
    got = flash.flash_forward(q, k, v, **options, q_descale=None, k_descale=None, v_descale=None)
    wide = [t.double().cpu().requires_grad_() for t in (q, k, v)]
    out, lse = oracle.flash_attention(
        *wide, cu_seqlens_q=ends_q.cpu(), cu_seqlens_k=ends_k.cpu(), **features
    )
    close([t.cpu() for t in got], (out, lse), dtype)
    douts = normal(*out.shape), torch.where(got[1].isfinite(), normal(*lse.shape), 0.0)
    grads = flash.flash_backward(douts[0], douts[1], q, k, v, *got, **options)
    lse = torch.where(lse.isfinite(), lse, 0.0)
    truth = torch.autograd.grad((out, lse), wide, [d.double().cpu() for d in douts])
    for mine, exact in zip(grads[:3], truth, strict=True):
        band = max(2 * TOLERANCE[dtype], 1e-4) * exact.abs().max().item()
        torch.testing.assert_close(mine.double().cpu(), exact, atol=band, rtol=0.05)


def test_fp8():
    q, k, v = (normal(2, 100, heads, 64).to(FP8) for heads in (8, 2, 2))
    factors = [torch.rand(2, 2, device="cuda") + 0.5 for _ in range(3)]
    names = ("q_descale", "k_descale", "v_descale")
    wide = [
        t.double() * f.repeat_interleave(t.shape[2] // 2, 1)[:, None, :, None]
        for t, f in zip((q, k, v), factors, strict=True)
    ]
    got = attend(q, k, v, causal=True, **dict(zip(names, factors, strict=True)))
    out, lse = oracle.flash_attention(*wide, causal=True)
    atol = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(got[0].double(), out.double(), atol=atol, rtol=atol)
    # q times its factors is rounded to bf16, which moves scores of up to about 4 by a step
    torch.testing.assert_close(got[1].double(), lse, atol=4 * 2**-8, rtol=0)


# lengths, capacity, q_len, q_heads, kv_heads, head_dim, value_dim
CASES = [
    ([40, 7], 40, 1, 4, 2, 64, 64),
    ([3, 33], 40, 3, 4, 1, 128, 128),
    ([40, 40, 40], 40, 16, 4, 4, 64, 64),
    ([4999], 5000, 1, 8, 2, 128, 128),
    ([64, 30], 64, 4, 4, 2, 64, 32),
    ([803], 900, 2, 8, 8, 256, 256),
]


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 64])
@pytest.mark.parametrize("left", [None, 2, 100])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("fp8", [False, True])
def test_decode_never_waits_for_the_gpu(dtype, case, page_size, left, softcap, fp8):
    lengths, capacity, q_len, q_heads, kv_heads, head_dim, value_dim = case
    batch, table, shape = len(lengths), None, (len(lengths), capacity)
    if page_size is not None:
        shape = (batch * -(-capacity // page_size), page_size)
        table = torch.randperm(shape[0], device="cuda").view(batch, -1).int()
    held = FP8 if fp8 else dtype
    q = normal(batch, q_len, q_heads, head_dim, dtype=dtype)
    k = normal(*shape, kv_heads, head_dim, dtype=held)
    v = normal(*shape, kv_heads, value_dim, dtype=held)
    options = {"softcap": softcap, "sinks": normal(q_heads), "k_scale": None, "v_scale": None}
    if fp8:
        for name in ("k_scale", "v_scale"):
            options[name] = torch.rand(batch, kv_heads, device="cuda") + 0.5
    seqlens = int32(*lengths)
    truth = decode_oracle.decode_attention(
        q.double(), k.double(), v.double(), cache_seqlens=seqlens, page_table=table,
        window=None if left is None else (left, 0), **options,
    )  # fmt: skip
    if page_size is None:
        for b, length in enumerate(lengths):
            k[b, length:] = v[b, length:] = math.nan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = decode.decode_forward(
            q, k, v, cache_seqlens=seqlens, page_table=table, window_left=left,
            scale=head_dim**-0.5, **options,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(got, truth, torch.float32 if fp8 and dtype == torch.float64 else dtype)


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("page_size", [None, 64])
def test_a_captured_decode_follows_the_lengths(q_len, page_size):
    q = normal(1, q_len, 8, 64, dtype=torch.bfloat16)
    k, v = normal(2, 1, 4096, 2, 64, dtype=torch.bfloat16)
    table = None
    if page_size is not None:
        k, v = (t.view(-1, page_size, 2, 64) for t in (k, v))
        table = torch.randperm(k.shape[0], device="cuda").view(1, -1).int()
    lengths = int32(4096)

    def run():
        return decode.decode_forward(
            q, k, v, cache_seqlens=lengths, page_table=table, window_left=None, softcap=0.0,
            sinks=None, scale=0.1, k_scale=None, v_scale=None,
        )  # fmt: skip

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for length in (4096, 1777, 16):
        lengths.fill_(length)
        graph.replay()
        for mine, eager in zip(captured, run(), strict=True):
            assert torch.equal(mine, eager)


@pytest.mark.parametrize("packed", [False, True])
def test_flash_is_captured(packed):
    q, k = normal(1, 512, 8, 128, dtype=torch.bfloat16), normal(1, 512, 2, 128).bfloat16()
    ends = int32(0, 100, 512) if packed else None
    eager = attend(q, k, k, causal=True, window=(64, 0), ends=ends)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, k, causal=True, window=(64, 0), ends=ends)
    graph.replay()
    assert torch.equal(captured[0], eager[0])


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    q = normal(1, 64, 8, 64, dtype=torch.bfloat16)
    k = torch.randn(1, 2**22 + 4096, 8, 64, dtype=torch.bfloat16, device="cuda")
    assert k.numel() > 2**31
    out, lse = attend(q, k, k, causal=True)
    parts = [
        attend(q, k[:, :-300], k[:, :-300]),
        attend(q, k[:, -300:], k[:, -300:], causal=True),
    ]
    merged, merged_lse = decode.merge_forward(*(torch.stack(t) for t in zip(*parts, strict=True)))
    torch.testing.assert_close(out, merged, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, merged_lse, atol=1e-4, rtol=0)
