"""Gradients of exact attention: finite differences in fp64, autograd through the oracle, torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import longctx
from longctx.ops import flash as ops_flash
from longctx.reference import flash as oracle
from longctx.torch_backend import _flash_tiles


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def leaves(batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim, dtype=torch.float64):
    shapes = (
        (batch, q_len, q_heads, head_dim),
        (batch, k_len, kv_heads, head_dim),
        (batch, k_len, kv_heads, value_dim),
    )
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


SHAPES = [(2, 5, 7, 4, 2, 4, 4), (1, 7, 5, 4, 1, 4, 6), (1, 6, 6, 2, 2, 8, 4)]
FEATURES = [
    {},
    {"causal": True},
    {"window": (2, 1)},
    {"window": (1, None)},
    {"causal": True, "softcap": 1.5},
    {"window": (3, 0), "softcap": 2.0, "scale": 0.9},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_gradcheck(shape, features, sinks):
    logits = torch.randn(shape[3], dtype=torch.float64, requires_grad=True) if sinks else None

    def run(q, k, v, logits):
        out, lse = longctx.flash_attention_with_lse(q, k, v, sinks=logits, **features)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    assert torch.autograd.gradcheck(run, (*leaves(*shape), logits), fast_mode=True)


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_gradcheck_packed(features):
    q, k, v = leaves(1, 7, 9, 4, 2, 4, 4)
    ends = {"cu_seqlens_q": int32(0, 3, 3, 5, 7), "cu_seqlens_k": int32(0, 4, 6, 6, 9)}
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, logits):
        return longctx.flash_attention_with_lse(q, k, v, sinks=logits, **ends, **features)

    assert torch.autograd.gradcheck(run, (q, k, v, logits), fast_mode=True)


@pytest.mark.parametrize("which", ["out", "lse"])
def test_one_of_the_outputs_alone(which):
    def run(q, k, v):
        return getattr(longctx.flash_attention_with_lse(q, k, v, causal=True), which)

    assert torch.autograd.gradcheck(run, leaves(1, 5, 5, 2, 1, 4, 4), fast_mode=True)


def test_unused_lse_costs_no_gradient(monkeypatch):
    """The backward primitive learns that lse was not used, instead of zeros."""
    seen = []
    real = ops_flash._backward_op

    def spy(dout, dlse, *rest):
        seen.append(dlse)
        return real(dout, dlse, *rest)

    monkeypatch.setattr(ops_flash, "_backward_op", spy)
    q, k, v = leaves(1, 4, 4, 2, 1, 4, 4)
    longctx.flash_attention(q, k, v).sum().backward()
    assert seen == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "features",
    [{"causal": True}, {"window": (40, 10)}, {"softcap": 3.0}, {"causal": True, "sinks": True}],
    ids=str,
)
def test_matches_autograd_through_the_oracle(dtype, features):
    """Odd lengths over several tiles; half precision within a few of its rounding steps."""
    features = dict(features)
    q, k, v = leaves(2, 255, 300, 6, 3, 16, 16, dtype)
    tensors = [q, k, v]
    if features.pop("sinks", False):
        features["sinks"] = torch.randn(6, requires_grad=True)
        tensors.append(features["sinks"])
    out, lse = longctx.flash_attention_with_lse(q, k, v, **features)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    ours = torch.autograd.grad((out, lse), tensors, (dout, dlse))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    if "sinks" in features:
        features["sinks"] = wide[3]
    truth = oracle.flash_attention(*wide[:3], **features)
    theirs = torch.autograd.grad(truth, wide, (dout.double(), dlse.double()))
    for mine, exact, leaf in zip(ours, theirs, tensors, strict=True):
        assert mine.dtype == leaf.dtype
        assert mine.is_contiguous()
        band = max(8 * torch.finfo(dtype).eps, 1e-6)
        # the largest gradient sets the scale: dS is a difference of numbers of that size
        torch.testing.assert_close(
            mine.double(), exact, atol=band * exact.abs().max().item(), rtol=band
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_matches_torch_sdpa(causal, kv_heads):
    q, k, v = leaves(2, 65, 65, 4, kv_heads, 32, 32, torch.float32)
    ours = longctx.flash_attention(q, k, v, causal=causal)
    theirs = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    dout = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v), dout),
        torch.autograd.grad(theirs, (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


def test_gradient_does_not_depend_on_the_tiles(monkeypatch):
    tensors = leaves(2, 37, 61, 4, 2, 8, 8)

    def grads():
        out, lse = longctx.flash_attention_with_lse(*tensors, window=(20, 5), softcap=2.0)
        return torch.autograd.grad(out.square().sum() + lse.square().sum(), tensors)

    whole = grads()
    monkeypatch.setattr(_flash_tiles, "BUDGET", 32 * 300)
    for a, b in zip(grads(), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_same_inputs_same_bits():
    tensors = leaves(1, 129, 129, 4, 2, 16, 16, torch.float32)
    first, second = (
        torch.autograd.grad(longctx.flash_attention(*tensors, causal=True).sum(), tensors)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_rows_have_zero_gradient():
    q, k, v = leaves(1, 9, 3, 2, 1, 4, 4)
    longctx.flash_attention(q, k, v, causal=True).sum().backward()
    assert (q.grad[:, :6] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert k.grad.abs().sum() > 0


def test_frozen_inputs_get_no_gradient():
    q, k, v = leaves(1, 5, 5, 2, 1, 4, 4)
    k.requires_grad_(False)
    longctx.flash_attention(q, k, v).sum().backward()
    assert k.grad is None
    assert q.grad is not None


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients(dynamic):
    q, k, v = leaves(2, 11, 13, 4, 2, 8, 8, torch.float32)
    logits = torch.randn(4, requires_grad=True)

    def loss(q, k, v, logits):
        out, lse = longctx.flash_attention_with_lse(q, k, v, causal=True, sinks=logits)
        return out.square().sum() + lse.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = (q, k, v, logits)
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors), tensors),
        torch.autograd.grad(loss(*tensors), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck(sinks):
    q, k, v = leaves(1, 5, 9, 4, 2, 4, 8, torch.float32)
    logits = torch.randn(4, requires_grad=sinks) if sinks else None
    options = (True, 4, None, 2.0, 0.3, "torch")
    torch.library.opcheck(
        torch.ops.longctx.flash_forward.default,
        (q, k, v, logits, None, None, None, None, None, *options),
    )
    with torch.no_grad():
        q, k, v = (t.detach() for t in (q, k, v))
        logits = None if logits is None else logits.detach()
        out, lse = longctx.flash_attention_with_lse(
            q, k, v, causal=True, window=(4, None), softcap=2.0, scale=0.3, sinks=logits
        )
        torch.library.opcheck(
            torch.ops.longctx.flash_backward.default,
            (out, lse, q, k, v, out, lse, logits, None, None, *options),
        )


def test_second_derivatives_are_refused():
    q, k, v = leaves(1, 5, 5, 2, 1, 4, 4)
    out = longctx.flash_attention(q, k, v)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        first.sum().backward()


def test_fp8_has_no_gradient():
    q, k, v = (t.detach().to(torch.float8_e4m3fn) for t in leaves(1, 4, 4, 2, 1, 16, 16))
    sinks = torch.zeros(2, requires_grad=True)
    with pytest.raises(longctx.UnsupportedError, match="no gradient for fp8 inputs"):
        longctx.flash_attention(q, k, v, sinks=sinks)
    with torch.no_grad():
        longctx.flash_attention(q, k, v, sinks=sinks)
