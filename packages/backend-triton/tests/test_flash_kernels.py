"""flash_forward and flash_backward against the fp64 oracle, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from longctx.reference import flash as oracle
from longctx.testing.budget import assert_within_budget

pytest.importorskip("triton")

import triton
import triton.language as tl

from longctx_triton import flash
from longctx_triton.kernels.flash_tiles import decode_e4m3
from longctx_triton.launch.flash import Device

FP8 = torch.float8_e4m3fn
NO_DESCALES = {"q_descale": None, "k_descale": None, "v_descale": None}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(device, shape, dtype=torch.float16):
    """Return q, k, v of ``(batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim)``."""
    batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim = shape
    return (
        torch.randn(batch, q_len, q_heads, head_dim, device=device).to(dtype),
        torch.randn(batch, k_len, kv_heads, head_dim, device=device).to(dtype),
        torch.randn(batch, k_len, kv_heads, value_dim, device=device).to(dtype),
    )


def ends(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def arguments(q, **options):
    """Fill in the keyword arguments that both primitives take."""
    defaults = {
        "causal": False,
        "window_left": None,
        "window_right": None,
        "softcap": 0.0,
        "sinks": None,
        "scale": q.shape[3] ** -0.5,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
    }
    return defaults | options


def expected(q, k, v, options, dtype):
    """Return the oracle's ``(out, lse)`` computed in ``dtype``."""
    options = dict(options)
    window = options.pop("window_left"), options.pop("window_right")
    sinks = options.pop("sinks")
    sinks = None if sinks is None else sinks.to(dtype)
    return oracle.flash_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), window=window, sinks=sinks, **options
    )


def check_forward(q, k, v, **options):
    options = arguments(q, **options)
    out, lse = flash.flash_forward(q, k, v, **options, **NO_DESCALES)
    exact = expected(q, k, v, options, torch.float64)
    rough = expected(q, k, v, options, q.dtype)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert_within_budget(out, exact[0], rough[0], name="out")
    assert_within_budget(lse, exact[1], rough[1], name="lse")
    torch.testing.assert_close(lse.double(), exact[1], atol=2e-5, rtol=2e-6)
    return out, lse


def gradients(q, k, v, dout, dlse, options, dtype):
    """Return the oracle's gradients, of the sinks too, of ``out . dout + lse . dlse``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    options = dict(options)
    if options["sinks"] is not None:
        options["sinks"] = options["sinks"].to(dtype).requires_grad_()
        leaves.append(options["sinks"])
    out, lse = expected(*leaves[:3], options, dtype)
    loss = (out * dout.to(dtype)).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * dlse.to(dtype)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad.nan_to_num()
        for leaf, grad in zip(leaves, found, strict=True)
    ]


def check_backward(q, k, v, *, use_lse=True, **options):
    options = arguments(q, **options)
    out, lse = flash.flash_forward(q, k, v, **options, **NO_DESCALES)
    dout = torch.randn(out.shape, device=q.device).to(out.dtype)
    dlse = torch.randn(lse.shape, device=q.device) if use_lse else None
    *grads, dsinks = flash.flash_backward(dout, dlse, q, k, v, out, lse, **options)
    exact = gradients(q, k, v, dout, dlse, options, torch.float64)
    rough = gradients(q, k, v, dout, dlse, options, q.dtype)
    for name, grad, right, low, like in zip(
        ("dq", "dk", "dv"), grads, exact, rough, (q, k, v), strict=False
    ):
        assert grad.dtype == like.dtype
        assert grad.is_contiguous()
        assert_within_budget(grad, right, low, name=name)
    if options["sinks"] is None:
        assert dsinks is None
    else:
        assert dsinks.dtype == torch.float32
        assert_within_budget(dsinks, exact[3], rough[3], name="dsinks")
    return grads, dsinks


# (batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim), options
CASES = {
    "full": ((2, 37, 53, 4, 2, 64, 64), {}),
    "causal": ((2, 70, 70, 2, 1, 64, 64), {"causal": True}),
    "causal with earlier keys": ((1, 37, 90, 4, 2, 64, 64), {"causal": True}),
    "causal with empty rows": ((1, 70, 33, 2, 1, 64, 64), {"causal": True}),
    "one query": ((2, 1, 45, 4, 2, 64, 64), {"causal": True}),
    "window on both sides": ((1, 90, 90, 2, 1, 64, 64), {"window_left": 11, "window_right": 7}),
    "window of one": ((1, 40, 40, 1, 1, 64, 64), {"window_left": 0, "window_right": 0}),
    "window to the left": ((1, 75, 99, 2, 1, 64, 64), {"causal": True, "window_left": 21}),
    "window to the right": ((1, 60, 75, 2, 1, 64, 64), {"window_right": 9}),
    "window with empty rows": ((1, 90, 40, 1, 1, 64, 64), {"window_left": 5, "window_right": 9}),
    "softcap": ((1, 40, 53, 2, 1, 64, 64), {"causal": True, "softcap": 2.0}),
    "head_dim 128": ((1, 40, 50, 2, 1, 128, 128), {"causal": True}),
    "head_dim 256": ((1, 35, 35, 1, 1, 256, 256), {"causal": True}),
    "head_dim 80, value_dim 48": ((1, 40, 50, 2, 1, 80, 48), {"causal": True}),
    "negative scale": ((1, 40, 50, 2, 1, 64, 64), {"scale": -0.2}),
    "scale 0": ((1, 20, 33, 1, 1, 64, 64), {"scale": 0.0, "causal": True}),
    "many heads": ((1, 18, 18, 6, 2, 64, 64), {"causal": True}),
    "no keys": ((1, 20, 0, 2, 1, 64, 64), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_forward(device, case):
    shape, options = CASES[case]
    check_forward(*inputs(device, shape), **options)


@pytest.mark.parametrize("case", CASES)
def test_backward(device, case):
    shape, options = CASES[case]
    check_backward(*inputs(device, shape), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(device, dtype):
    q, k, v = inputs(device, (1, 45, 51, 2, 1, 64, 64), dtype)
    check_forward(q, k, v, causal=True)
    check_backward(q, k, v, causal=True)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window_left": 15}, {"softcap": 3.0}])
def test_sinks(device, options):
    q, k, v = inputs(device, (2, 60, 44, 4, 2, 64, 64))
    sinks = torch.tensor([-3.0, 0.0, 5.0, -torch.inf], device=device)
    check_forward(q, k, v, sinks=sinks, **options)
    check_backward(q, k, v, sinks=sinks, **options)


PACKED = ((0, 0, 40, 41, 41, 100), (0, 7, 60, 61, 90, 120))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "window_left": 13}, {"window_right": 4}],
)
def test_packed(device, options):
    ends_q, ends_k = (ends(device, *values) for values in PACKED)
    q, k, v = inputs(device, (1, 100, 120, 4, 2, 64, 64))
    options = {**options, "cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k}
    check_forward(q, k, v, **options)
    check_backward(q, k, v, **options)


def test_packed_rows_behind_the_last_end_are_empty(device):
    q, k, v = inputs(device, (1, 90, 80, 2, 1, 64, 64))
    ends_q, ends_k = ends(device, 0, 30, 40), ends(device, 0, 20, 50)
    check_forward(q, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)
    grads, _ = check_backward(q, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)
    assert not grads[0][:, 40:].any()
    assert not grads[1][:, 50:].any()


def test_many_short_sequences(device):
    lengths = torch.randint(0, 9, (40,))
    packed = torch.zeros(41, dtype=torch.int32)
    packed[1:] = lengths.cumsum(0)
    total = int(packed[-1])
    q, k, v = inputs(device, (1, total, total, 1, 1, 64, 64))
    packed = packed.to(device)
    check_forward(q, k, v, causal=True, cu_seqlens_q=packed, cu_seqlens_k=packed)


def test_strides(device):
    """Head-major keys, values inside a wider row, expanded queries, an odd gradient."""
    _, k, _ = inputs(device, (2, 50, 50, 4, 2, 64, 64))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.randn(2, 50, 2, 96, device=device).half()[..., 16:80]
    q = torch.randn(1, 50, 1, 64, device=device).half().expand(2, 50, 4, 64)
    check_forward(q, k, v, causal=True)
    check_backward(q, k, v, causal=True)
    options = arguments(q, causal=True)
    out, lse = flash.flash_forward(q, k, v, **options, **NO_DESCALES)
    dout = torch.randn(2, 4, 50, 64, device=device).half().transpose(1, 2)
    ours = flash.flash_backward(dout, None, q, k, v, out, lse, **options)
    again = flash.flash_backward(dout.contiguous(), None, q, k, v, out, lse, **options)
    for one, other in zip(ours[:3], again[:3], strict=True):
        assert torch.equal(one, other)


def test_without_a_gradient_of_lse(device):
    check_backward(*inputs(device, (1, 50, 60, 2, 1, 64, 64)), use_lse=False, causal=True)


def test_large_scores_do_not_overflow(device):
    q, k, v = inputs(device, (1, 40, 64, 1, 1, 64, 64))
    out, lse = check_forward(q * 30, k * 30, v, causal=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    check_forward(q * 30, k * 30, v, causal=True, softcap=50.0)


def test_same_bits_every_time(device):
    q, k, v = inputs(device, (1, 70, 70, 4, 2, 64, 64))
    options = arguments(q, causal=True, sinks=torch.zeros(4, device=device))
    runs = []
    for _ in range(2):
        out, lse = flash.flash_forward(q, k, v, **options, **NO_DESCALES)
        runs.append([out, lse, *flash.flash_backward(out, lse, q, k, v, out, lse, **options)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_of_other_sequences_do_not_leak(device, value):
    """What lies behind a sequence in memory may hold anything."""
    ends_q = ends(device, 0, 21, 60)
    q, k, v = inputs(device, (1, 60, 60, 1, 1, 64, 64))
    k[:, 21:], v[:, 21:], q[:, 21:] = value, value, value
    options = arguments(q, causal=True, cu_seqlens_q=ends_q, cu_seqlens_k=ends_q)
    out, lse = flash.flash_forward(q, k, v, **options, **NO_DESCALES)
    alone = [t[:, :21] for t in (q, k, v)]
    exact, _ = expected(*alone, arguments(q, causal=True), torch.float64)
    rough, _ = expected(*alone, arguments(q, causal=True), torch.float16)
    assert_within_budget(out[:, :21], exact, rough)
    assert lse[..., :21].isfinite().all()
    grads = flash.flash_backward(torch.ones_like(out), lse, q, k, v, out, lse, **options)
    for grad in grads[:3]:
        assert grad[:, :21].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 5), (1, 5, 0), (1, 0, 0)])
def test_empty_axes(device, shape):
    batch, q_len, k_len = shape
    q, k, v = inputs(device, (batch, q_len, k_len, 2, 1, 64, 64))
    options = arguments(q, sinks=torch.zeros(2, device=device))
    out, lse = flash.flash_forward(q, k, v, **options, **NO_DESCALES)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == 0).all()
    grads = flash.flash_backward(out, None, q, k, v, out, lse, **options)
    for grad, like in zip(grads, (q, k, v, options["sinks"]), strict=True):
        assert grad.shape == like.shape
        assert not grad.any()


@pytest.mark.parametrize("descales", [False, True])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_left": 9, "softcap": 4.0}])
def test_fp8(device, options, descales):
    q, k, v = inputs(device, (2, 37, 53, 4, 2, 64, 64), FP8)
    factors = dict(NO_DESCALES)
    if descales:
        factors = {name: 0.5 + torch.rand(2, 2, device=device) for name in factors}
    options = arguments(q, **options)
    out, lse = flash.flash_forward(q, k, v, **options, **factors)
    wide = []
    for tensor, factor in zip((q, k, v), factors.values(), strict=True):
        tensor = tensor.double()
        if factor is not None:
            spread = factor.double().repeat_interleave(tensor.shape[2] // 2, 1)
            tensor = tensor * spread[:, None, :, None]
        wide.append(tensor)
    exact, exact_lse = expected(*wide, options, torch.float64)
    rough, _ = expected(*wide, options, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert_within_budget(out, exact, rough)
    torch.testing.assert_close(lse.double(), exact_lse, atol=5e-3, rtol=1e-3)


@triton.jit
def _decode(raw, values):
    o = tl.arange(0, 256)
    tl.store(values + o, decode_e4m3(tl.load(raw + o)))


def test_every_e4m3_byte_decodes(device):
    """The bytes' way to fp16 is exact, subnormal values included."""
    raw = torch.arange(256, dtype=torch.uint8, device=device)
    values = torch.empty(256, dtype=torch.float16, device=device)
    _decode[(1,)](raw, values)
    numbers = raw.view(FP8).half()
    assert torch.equal(values[numbers.isfinite()], numbers[numbers.isfinite()])


def test_fp8_products(monkeypatch, device):
    """Tensor cores that know fp8 take e4m3 queries and keys as they are."""
    if device.type == "cuda":
        pytest.skip("the device decides")
    monkeypatch.setattr(flash, "device_of", lambda _: Device((8, 9), 1, 0))
    q, k, v = inputs(device, (1, 150, 70, 1, 1, 64, 64), FP8)
    options = arguments(q, causal=True)
    out, _ = flash.flash_forward(q, k, v, **options, **NO_DESCALES)
    exact, _ = expected(q, k, v, options, torch.float64)
    rough, _ = expected(q, k, v, options, torch.bfloat16)
    assert_within_budget(out, exact, rough)
