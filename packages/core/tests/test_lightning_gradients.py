"""Gradients of lightning attention, the carried state's included."""

from __future__ import annotations

import pytest
import torch

import longctx
from longctx.reference import lightning as reference
from longctx.torch_backend import lightning as backend

DECAY = torch.tensor([0.0, -0.02, -3.0])
NAMES = ("q", "k", "v", "initial_state")


def leaves(batch, length, sequences=None, dim=8, value_dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, 3, d) for d in (dim, dim, value_dim)]
    shapes.append((sequences or batch, 3, dim, value_dim))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def gradients(function, tensors, *, ends=None, use=("out", "final_state"), **options):
    """Return the gradients of a random linear form of the outputs in ``use``."""
    q, k, v, first = tensors
    out, final = function(q, k, v, DECAY, initial_state=first, cu_seqlens=ends, **options)
    generator = torch.Generator().manual_seed(3)
    weights = (
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for t in (out, final)
    )
    loss = sum(
        (t * w).sum()
        for name, t, w in zip(("out", "final_state"), (out, final), weights, strict=True)
        if name in use
    )
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def assert_same(got, wanted, tolerance=1e-10):
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"d{name}: {m}"
        )


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 127, 129, 257])
@pytest.mark.parametrize("use", [("out",), ("final_state",), ("out", "final_state")])
def test_equals_the_gradient_of_the_recurrence(length, use):
    tensors = leaves(2, length)
    got = gradients(longctx.lightning_attention, tensors, use=use, scale=0.7)
    assert_same(got, gradients(reference.lightning_attention, tensors, use=use, scale=0.7))


def test_packed_sequences():
    ends = torch.tensor([0, 1, 1, 66, 66, 67, 140], dtype=torch.int32)
    tensors = leaves(1, 140, sequences=6)
    got = gradients(longctx.lightning_attention, tensors, ends=ends)
    assert_same(got, gradients(reference.lightning_attention, tensors, ends=ends))


@pytest.mark.parametrize("ends", [None, [0, 3, 3, 9]])
def test_gradcheck(ends, monkeypatch):
    monkeypatch.setattr(backend, "CPU_CHUNK", 4)
    if ends is not None:
        ends = torch.tensor(ends, dtype=torch.int32)
    tensors = leaves(1, 9, None if ends is None else len(ends) - 1, dim=3, value_dim=2)

    def function(q, k, v, first):
        return longctx.lightning_attention(
            q, k, v, DECAY, scale=0.7, initial_state=first, cu_seqlens=ends
        )

    assert torch.autograd.gradcheck(function, tensors)


def test_gradients_flow_from_chunk_to_chunk():
    q, k, v, first = leaves(2, 130)
    whole = gradients(longctx.lightning_attention, (q, k, v, first))

    def in_two(q, k, v, decay, initial_state, cu_seqlens):
        cut = 50
        head = (t[:, :cut] for t in (q, k, v))
        tail = (t[:, cut:] for t in (q, k, v))
        out, state = longctx.lightning_attention(*head, decay, initial_state=initial_state)
        rest, state = longctx.lightning_attention(*tail, decay, initial_state=state)
        return torch.cat([out, rest], 1), state

    assert_same(gradients(in_two, (q, k, v, first)), whole)


def test_head_major_views():
    fused = torch.randn(2, 70, 3, 21, dtype=torch.float64, requires_grad=True)
    first = torch.zeros(2, 3, 8, 5, dtype=torch.float64, requires_grad=True)
    views = (*fused.split((8, 8, 5), -1), first)
    copies = [t.detach().clone().requires_grad_() for t in views]
    got = gradients(longctx.lightning_attention, views)
    assert_same(got, gradients(longctx.lightning_attention, copies))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    *tensors, first = leaves(2, 200, dtype=dtype)
    tensors.append(first.detach().float().requires_grad_())
    got = gradients(longctx.lightning_attention, tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = gradients(reference.lightning_attention, exact)
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert a.dtype == (torch.float32 if name == "initial_state" else dtype)
        error = ((a.double() - b).square().mean() / b.square().mean()).sqrt()
        assert error < 4e-3, name


def test_state_without_gradient_and_gradient_of_a_sum():
    # a sum's gradient is one expanded number, whose strides are all 0
    q, k, v, _ = leaves(2, 70)
    out, final = longctx.lightning_attention(q, k, v, DECAY)
    got = torch.autograd.grad(out.sum() + final.sum(), (q, k, v))
    out, final = reference.lightning_attention(q, k, v, DECAY)
    wanted = torch.autograd.grad(out.sum() + final.sum(), (q, k, v))
    assert_same((*got, q), (*wanted, q))


def test_backends_get_gradients_with_a_unit_last_stride(monkeypatch):
    seen = []

    def spied(dout, dfinal_state, *tensors, **options):
        seen.extend([dout, dfinal_state])
        return backend.lightning_backward(dout, dfinal_state, *tensors, **options)

    named = {"lightning_backward": spied, "lightning_forward": backend.lightning_forward}
    monkeypatch.setattr("longctx.ops.lightning.primitive", lambda _, name: named[name])
    q, k, v, _ = leaves(2, 9)
    out, final = longctx.lightning_attention(q, k, v, DECAY)
    (out.sum() + final.sum()).backward()
    assert [t.stride(-1) for t in seen] == [1, 1]


def test_second_derivative_is_refused():
    q, k, v, first = leaves(1, 5)
    out, _ = longctx.lightning_attention(q, k, v, DECAY, initial_state=first)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dq.sum().backward()


def test_registered_operators():
    q, k, v, first = leaves(2, 66, dtype=torch.float32)
    ops = torch.ops.longctx
    torch.library.opcheck(
        ops.lightning_forward.default, (q, k, v, DECAY, first, None, 0.5, "torch")
    )
    q, k, v, first = (t.detach() for t in (q, k, v, first))
    torch.library.opcheck(
        ops.lightning_backward.default,
        (v, first, q, k, v, DECAY, first, None, 0.5, "torch"),
    )


def test_traces_without_a_break():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def traced(q, k, v, decay, initial_state, cu_seqlens):
        return longctx.lightning_attention(q, k, v, decay, initial_state=initial_state)

    for length in (70, 90):
        tensors = leaves(2, length)
        got = gradients(traced, tensors)
        assert_same(got, gradients(longctx.lightning_attention, tensors))
