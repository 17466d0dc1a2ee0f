"""Gradients of exact attention, through the output and through the log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import flash as oracle
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_flash import coarse, coarse_qkv

__all__ = ["TestFlashGradients"]

NAMES = ("dq", "dk", "dv", "dsinks")


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Ask PyTorch and the backend for repeatable results."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def exact_gradients(
    tensors: list[Tensor], upstream: list[Tensor], **options: Any
) -> tuple[Tensor, ...]:
    """Return autograd's gradients through the oracle in fp64."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    sinks = leaves[3] if len(leaves) > 3 else None
    results = oracle.flash_attention(leaves[0], leaves[1], leaves[2], sinks=sinks, **options)
    return torch.autograd.grad(results[: len(upstream)], leaves, [t.double() for t in upstream])


def low_precision_gradients(
    tensors: list[Tensor], upstream: list[Tensor], **options: Any
) -> list[Tensor]:
    """Return the gradients by the formula of FlashAttention-2, written out with whole matrices.

    ``P = exp(S - lse)`` and ``dS = P (dP - rowsum(dO O) + dlse)`` cancel where autograd's formula
    does not, so that errors of ``lse``, ``O`` and a second ``S`` show: what a backward pass can do
    is measured with what it computes. ``O`` is the oracle's in the inputs' dtype, to which ``P``
    and ``dS`` are rounded too; sums are kept in fp32.
    """
    dtype = tensors[0].dtype
    given = {**options, "sinks": tensors[3].detach() if len(tensors) > 3 else None}
    q, k, v = (t.detach() for t in tensors[:3])
    out = coarse(oracle.flash_attention(q, k, v, **given)[0].float())
    lse = oracle.flash_attention(q.float(), k.float(), v.float(), **given)[1]
    q, k, v = coarse_qkv(q.float(), k.float(), v.float())
    values_to_weights = torch.eye(k.shape[1], device=q.device).unsqueeze(1)
    weights, again = oracle.flash_attention(
        q, k, values_to_weights.expand(*k.shape[:3], -1), **given
    )
    gone_by = (again - lse).nan_to_num().exp().transpose(1, 2).unsqueeze(3)
    weights = (weights * gone_by).to(dtype).float()
    scale = options.get("scale") or q.shape[3] ** -0.5
    group = q.shape[2] // k.shape[2]
    every_k, every_v = (t.repeat_interleave(group, 2) for t in (k, v))
    dout = upstream[0].float()
    # [B, Sq, Hq, 1]: dlse - rowsum(dO O)
    delta = -(dout * out).sum(-1, keepdim=True)
    if len(upstream) > 1:
        delta = delta + upstream[1].transpose(1, 2).unsqueeze(3)
    dscores = weights * (torch.einsum("bihd,bjhd->bihj", dout, every_v) + delta)
    if cap := options.get("softcap"):
        scores = torch.einsum("bihd,bjhd->bihj", q, every_k) * scale
        dscores = dscores * (1 - torch.tanh(scores / cap) ** 2)
    dscores = (scale * dscores).to(dtype).float()
    dq = torch.einsum("bihj,bjhd->bihd", dscores, every_k)
    dk, dv = (
        torch.unflatten(torch.einsum("bihj,bihd->bjhd", matrix, rows), 2, (-1, group)).sum(3)
        for matrix, rows in ((dscores, q), (weights, dout))
    )
    if len(tensors) == 3:
        return [dq, dk, dv]
    share = coarse(torch.exp(tensors[3].detach().view(1, -1, 1) - lse))
    share = share.transpose(1, 2).unsqueeze(3)
    return [dq, dk, dv, (share * delta).sum((0, 1, 3))]


def check_gradients(
    subject: Subject,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    through_lse: bool = True,
    **options: Any,
) -> list[Tensor]:
    """Check the gradients of q, k, v (and sinks) of one call; return them."""
    tensors = [t.detach().requires_grad_() for t in (q, k, v, sinks) if t is not None]
    given = options if sinks is None else {**options, "sinks": tensors[3]}
    results = subject.run(longctx.flash_attention_with_lse, *tensors[:3], **given)
    upstream = [subject.randn(*results.out.shape)]
    if through_lse:
        upstream.append(subject.randn(*results.lse.shape, dtype=torch.float32))
    got = subject.run(_backward, results[: len(upstream)], tensors, upstream)
    for gradient, leaf in zip(got, tensors, strict=True):
        assert gradient.dtype == leaf.dtype
    exact = exact_gradients(tensors, upstream, **options)
    low = low_precision_gradients(tensors, upstream, **options)
    subject.check_all(got, exact, low, NAMES[: len(got)])
    return list(got)


def _backward(
    results: tuple[Tensor, ...], leaves: list[Tensor], upstream: list[Tensor], backend: str
) -> tuple[Tensor, ...]:
    """Differentiate; ``backend`` was chosen when the results were made."""
    return torch.autograd.grad(results, leaves, upstream)


OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full": ((), {}),
    "causal": ((), {"causal": True}),
    "scale": ((), {"causal": True, "scale": 0.3}),
    "window": (("window",), {"causal": True, "window": (40, 0)}),
    "both-sides": (("window",), {"window": (33, 70)}),
    "left": (("window",), {"window": (64, None)}),
    "softcap": (("softcap",), {"causal": True, "softcap": 2.0}),
    "softcap-window": (("softcap", "window"), {"window": (50, 9), "softcap": 1.0}),
}


@pytest.mark.longctx_op("flash_attention", dtypes=("bf16", "fp16", "fp32"))
class TestFlashGradients:
    """The backward pass against autograd through the fp64 oracle."""

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (129, 129), (65, 255), (255, 127)])
    def test_options(self, subject: Subject, q_len: int, k_len: int, options: str) -> None:
        features, chosen = OPTIONS[options]
        subject.require(*features, gradient=True)
        subject.require_length(q_len, k_len)
        check_gradients(subject, *subject.qkv(2, q_len, k_len), **chosen)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_every_length(self, subject: Subject, length: int) -> None:
        """Up to 1000 queries square; the longest one for a few queries at its end."""
        subject.require(gradient=True)
        subject.require_length(length)
        q_len = length if length <= 1000 else 65
        made = subject.qkv(1, q_len, length, q_heads=2, kv_heads=1)
        check_gradients(subject, *made, causal=True)

    @pytest.mark.parametrize(("q_heads", "kv_heads"), [(3, 3), (4, 1), (8, 2), (8, 1), (16, 1)])
    def test_grouped_heads(self, subject: Subject, q_heads: int, kv_heads: int) -> None:
        subject.require(q_heads=q_heads, kv_heads=kv_heads, gradient=True)
        subject.require_length(129)
        made = subject.qkv(2, 65, 129, q_heads=q_heads, kv_heads=kv_heads)
        check_gradients(subject, *made, causal=True)

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize(
        ("head_dim", "value_dim"), [(64, 64), (128, 128), (256, 256), (192, 128)]
    )
    def test_head_dims(
        self, subject: Subject, head_dim: int, value_dim: int, causal: bool
    ) -> None:
        subject.require(head_dim=head_dim, value_dim=value_dim, gradient=True)
        subject.require_length(129)
        made = subject.qkv(1, 129, 129, head_dim=head_dim, value_dim=value_dim)
        check_gradients(subject, *made, causal=causal)

    @pytest.mark.parametrize("options", ["full", "causal", "window", "softcap"])
    def test_sinks(self, subject: Subject, options: str) -> None:
        features, chosen = OPTIONS[options]
        subject.require("sinks", *features, q_heads=32, kv_heads=4, gradient=True)
        subject.require_length(129)
        # many heads, for a sink's gradient is one number a head: few would make a chance budget
        q, k, v = subject.qkv(2, 65, 129, q_heads=32, kv_heads=4)
        sinks = subject.randn(32, dtype=torch.float32, scale=2.0)
        check_gradients(subject, q, k, v, sinks, **chosen)

    @pytest.mark.parametrize("options", ["full", "causal", "window", "softcap"])
    @pytest.mark.parametrize(
        ("q_lens", "k_lens"),
        [
            ([64, 1, 130, 5], [64, 1, 130, 5]),
            ([7, 0, 65, 9, 3], [9, 4, 100, 2, 0]),
        ],
        ids=str,
    )
    def test_packed_sequences(
        self, subject: Subject, q_lens: list[int], k_lens: list[int], options: str
    ) -> None:
        features, chosen = OPTIONS[options]
        subject.require("varlen", *features, gradient=True)
        subject.require_length(200)
        ends: dict[str, Any] = {
            f"cu_seqlens_{name}": torch.tensor(
                [0, *torch.tensor(lengths).cumsum(0).tolist()],
                dtype=torch.int32,
                device=subject.device,
            )
            for name, lengths in (("q", q_lens), ("k", k_lens))
        }
        made = subject.qkv(1, sum(q_lens), sum(k_lens))
        check_gradients(subject, made[0], made[1], made[2], **ends, **chosen)

    def test_the_output_alone(self, subject: Subject) -> None:
        subject.require(gradient=True)
        subject.require_length(129)
        check_gradients(subject, *subject.qkv(2, 65, 129), through_lse=False, causal=True)

    def test_the_lse_alone(self, subject: Subject) -> None:
        subject.require(gradient=True)
        subject.require_length(129)
        tensors = [t.requires_grad_() for t in subject.qkv(2, 65, 129)]
        lse = subject.run(longctx.flash_attention_with_lse, *tensors, causal=True).lse
        upstream = subject.randn(*lse.shape, dtype=torch.float32)
        got = torch.autograd.grad(lse, tensors[:2], upstream)
        upstreams = [torch.zeros_like(tensors[0]), upstream]
        exact = exact_gradients(tensors, upstreams, causal=True)[:2]
        low = low_precision_gradients(tensors, upstreams, causal=True)[:2]
        subject.check_all(got, exact, low, NAMES[:2])

    def test_rows_that_see_nothing_have_no_gradient(self, subject: Subject) -> None:
        subject.require(gradient=True)
        subject.require_length(129)
        dq, dk, dv = check_gradients(subject, *subject.qkv(2, 129, 63), causal=True)
        assert (dq[:, :66] == 0).all()
        assert all(t.isfinite().all() for t in (dk, dv))

    def test_keys_that_nobody_sees_have_no_gradient(self, subject: Subject) -> None:
        subject.require("window", gradient=True)
        subject.require_length(255)
        made = subject.qkv(2, 20, 255)
        _, dk, dv = check_gradients(subject, *made, causal=True, window=(30, 0))
        assert (dk[:, : 255 - 20 - 30] == 0).all()
        assert (dv[:, : 255 - 20 - 30] == 0).all()

    @pytest.mark.parametrize("view", ["head-major", "expanded"])
    def test_strides_of_the_upstream_gradient_do_not_matter(
        self, subject: Subject, view: str
    ) -> None:
        subject.require(gradient=True)
        subject.require_length(129)
        tensors = [t.requires_grad_() for t in subject.qkv(2, 65, 129)]
        out = subject.run(longctx.flash_attention, *tensors, causal=True)
        upstream = subject.randn(2, 65, 4, 64)
        if view == "head-major":
            upstream = upstream.transpose(1, 2).contiguous().transpose(1, 2)
        else:  # what a sum hands back: one number, all strides 0
            upstream = subject.randn(1, 1, 1, 1).expand(2, 65, 4, 64)
        got = torch.autograd.grad(out, tensors, upstream)
        exact = exact_gradients(tensors, [upstream], causal=True)
        low = low_precision_gradients(tensors, [upstream], causal=True)
        subject.check_all(got, exact, low, NAMES[:3])

    def test_strides_of_the_inputs_do_not_matter(self, subject: Subject) -> None:
        subject.require(gradient=True)
        subject.require_length(129)
        fused = subject.randn(2, 129, 8, 64)
        q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
        check_gradients(subject, q, k, v, causal=True)

    @pytest.mark.parametrize("frozen", [0, 1, 2])
    def test_frozen_inputs_get_no_gradient(self, subject: Subject, frozen: int) -> None:
        subject.require(gradient=True)
        subject.require_length(33)
        tensors = list(subject.qkv(1, 33, 33))
        for n, tensor in enumerate(tensors):
            tensor.requires_grad_(n != frozen)
        out = subject.run(longctx.flash_attention, *tensors)
        torch.autograd.backward(out.sum())
        for n, tensor in enumerate(tensors):
            assert (tensor.grad is None) == (n == frozen)

    @pytest.mark.parametrize("asked", [False, True], ids=["", "deterministic-algorithms"])
    def test_same_inputs_give_the_same_bits(self, subject: Subject, asked: bool) -> None:
        subject.require(gradient=True, q_heads=8)
        subject.require_length(1000)
        if not asked and not (
            subject.support.deterministic and subject.support.deterministic_gradient
        ):
            pytest.skip("not declared: determinism")
        tensors = [t.requires_grad_() for t in subject.qkv(1, 1000, 1000, q_heads=8)]
        upstream = subject.randn(1, 1000, 8, 64)
        runs = []
        with deterministic_algorithms() if asked else nullcontext():
            for _ in range(20 if subject.device.type == "cuda" else 2):
                out = subject.run(longctx.flash_attention, *tensors, causal=True)
                runs.append(torch.autograd.grad(out, tensors, upstream))
        for run in runs[1:]:
            for one, first in zip(run, runs[0], strict=True):
                assert torch.equal(one, first)

    def test_a_second_derivative_is_refused(self, subject: Subject) -> None:
        subject.require(gradient=True)
        q, k, v = (t.requires_grad_() for t in subject.qkv(1, 9, 9))
        out = subject.run(longctx.flash_attention, q, k, v)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.backward(first.sum())
