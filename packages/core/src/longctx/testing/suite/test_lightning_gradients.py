"""Gradients of lightning attention: q, k, v and the state that is carried in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import lightning as oracle
from longctx.testing.low_precision import CHUNKS, chunked_lightning
from longctx.testing.subject import Subject
from longctx.testing.suite.test_lightning import (
    DECAYS,
    Pair,
    decays,
    equal_heads,
    farthest,
    fused_views,
)
from longctx.testing.suite.test_lightning_state import PACKED, carried

__all__ = ["TestLightningGradients"]

Upstream = tuple[Tensor | None, Tensor | None]


def gradients(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    log_decay: Tensor,
    upstream: Upstream,
    **options: Any,
) -> list[Tensor]:
    """Return the gradients of ``tensors``, which are q, k, v and perhaps an initial state.

    ``upstream`` holds the gradients of out and final_state; None is a result that is not used.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    state = {"initial_state": leaves[3]} if len(leaves) > 3 else {}
    results = function(*leaves[:3], log_decay, **state, **options)
    used = [
        (result, grad.to(result.dtype))
        for result, grad in zip(results, upstream, strict=True)
        if grad is not None
    ]
    found = torch.autograd.grad(
        [result for result, _ in used], leaves, [grad for _, grad in used], allow_unused=True
    )
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, found, strict=True)
    ]


def upstream_of(subject: Subject, v: Tensor, sequences: int, head_dim: int = 64) -> Upstream:
    """Return random gradients of out and final_state."""
    heads, value_dim = v.shape[2:]
    state = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim}
    return subject.randn(*v.shape), carried(subject, sequences, **state)


def check_gradients(
    subject: Subject,
    got: Sequence[Tensor],
    tensors: Sequence[Tensor],
    log_decay: Tensor,
    upstream: Upstream,
    **options: Any,
) -> None:
    """Check gradients head by head against those of the recurrence in fp64."""
    wide = [t.double() for t in tensors]
    exact = gradients(oracle.lightning_attention, wide, log_decay.double(), upstream, **options)
    cuts = [
        gradients(chunked_lightning, tensors, log_decay, upstream, chunk=chunk, **options)
        for chunk in CHUNKS
    ]
    low = [
        farthest(right, ways) for right, ways in zip(exact, zip(*cuts, strict=True), strict=True)
    ]
    for n, name in enumerate(("dq", "dk", "dv")):
        assert got[n].dtype == subject.dtype
        for h in range(got[n].shape[2]):
            one, right, about = (grads[n][:, :, h] for grads in (got, exact, low))
            subject.check(one, right, about, f"{name} of head {h}")
    if len(got) > 3:
        assert got[3].dtype == torch.float32
        subject.check(got[3], exact[3], low[3], "dinitial_state")


def run_and_check(
    subject: Subject,
    tensors: Sequence[Tensor],
    log_decay: Tensor,
    upstream: Upstream,
    **options: Any,
) -> list[Tensor]:
    """Run forward and backward, check the gradients, return them."""
    got: list[Tensor] = subject.run(
        gradients, longctx.lightning_attention, tensors, log_decay, upstream, **options
    )
    check_gradients(subject, got, tensors, log_decay, upstream, **options)
    return got


@pytest.mark.longctx_op("lightning_attention", dtypes=("bf16", "fp16", "fp32"))
class TestLightningGradients:
    """The backward pass against autograd through the recurrence in fp64."""

    @pytest.mark.parametrize("length", [1, 63, 65, 129, 255])
    def test_every_length(self, subject: Subject, length: int) -> None:
        subject.require("initial-state", q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(length)
        made = equal_heads(subject, 1, length)
        tensors = (*made, carried(subject, 1))
        upstream = upstream_of(subject, made[2], 1)
        run_and_check(subject, tensors, decays(subject), upstream, scale=0.7)

    @pytest.mark.parametrize("used", ["out", "final_state"])
    @pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
    def test_results_that_are_not_used(self, subject: Subject, used: str, given: bool) -> None:
        features = ("initial-state",) if given else ()
        subject.require(*features, q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(129)
        made = equal_heads(subject, 2, 129)
        tensors = (*made, carried(subject, 2)) if given else made
        dout, dfinal = upstream_of(subject, made[2], 2)
        upstream = (dout, None) if used == "out" else (None, dfinal)
        run_and_check(subject, tensors, decays(subject), upstream)

    @pytest.mark.parametrize(("head_dim", "value_dim"), [(128, 128), (64, 128), (128, 64)])
    def test_head_dims(self, subject: Subject, head_dim: int, value_dim: int) -> None:
        subject.require(
            q_heads=4, kv_heads=4, head_dim=head_dim, value_dim=value_dim, gradient=True
        )
        subject.require_length(129)
        made = equal_heads(subject, 1, 129, head_dim=head_dim, value_dim=value_dim)
        upstream = upstream_of(subject, made[2], 1, head_dim)
        run_and_check(subject, made, decays(subject), upstream)

    @pytest.mark.parametrize("model", ["minimax-0", "minimax-78", "transnormer"])
    def test_decays_of_real_models(self, subject: Subject, model: str) -> None:
        subject.require(q_heads=8, kv_heads=8, gradient=True)
        subject.require_length(129)
        made = equal_heads(subject, 1, 129, 8)
        upstream = upstream_of(subject, made[2], 1)
        run_and_check(subject, made, DECAYS[model].to(subject.device), upstream)

    def test_strong_decay(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(129)
        made = equal_heads(subject, 1, 129)
        strong = decays(subject, (-20.0, -90.0, -1e4, -1e30))
        run_and_check(subject, made, strong, upstream_of(subject, made[2], 1))

    @pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
    def test_packed_sequences(self, subject: Subject, given: bool) -> None:
        features = ("varlen", "initial-state") if given else ("varlen",)
        subject.require(*features, q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(sum(PACKED))
        made = equal_heads(subject, 1, sum(PACKED))
        tensors = (*made, carried(subject, len(PACKED))) if given else made
        ends = torch.tensor((0, *PACKED), device=subject.device).cumsum(0).to(torch.int32)
        upstream = upstream_of(subject, made[2], len(PACKED))
        run_and_check(subject, tensors, decays(subject), upstream, cu_seqlens=ends)

    def test_flow_from_chunk_to_chunk(self, subject: Subject) -> None:
        """Two calls that hand the state on have the gradients of one."""
        subject.require("initial-state", q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(129)
        made = equal_heads(subject, 1, 129)
        upstream = upstream_of(subject, made[2], 1)

        def in_two(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options: Any) -> Pair:
            outs: list[Tensor] = []
            state: Any = None
            for a, b in pairwise((0, 50, 129)):
                out, state = longctx.lightning_attention(
                    q[:, a:b], k[:, a:b], v[:, a:b], log_decay, initial_state=state, **options
                )
                outs.append(out)
            return torch.cat(outs, 1), state

        log_decay = decays(subject)
        got = subject.run(gradients, in_two, made, log_decay, upstream)
        check_gradients(subject, got, made, log_decay, upstream)

    def test_views_of_a_fused_projection(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(129)
        made = fused_views(subject.randn(2, 129, 4, 192))
        dout, dfinal = upstream_of(subject, made[2], 2)
        assert dout is not None
        head_major = dout.transpose(1, 2).contiguous().transpose(1, 2)
        run_and_check(subject, made, decays(subject), (head_major, dfinal))

    def test_gradient_of_a_sum(self, subject: Subject) -> None:
        """The gradient of a sum is one number, expanded: all of its strides are 0."""
        subject.require(q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(65)
        made = equal_heads(subject, 2, 65)
        one = torch.ones((), device=subject.device)
        upstream = one.to(subject.dtype).expand(2, 65, 4, 64), one.expand(2, 4, 64, 64)
        run_and_check(subject, made, decays(subject), upstream)

    def test_same_inputs_give_the_same_bits(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(255)
        if not subject.support.deterministic:
            pytest.skip("not declared: determinism")
        made = equal_heads(subject, 2, 255)
        upstream = upstream_of(subject, made[2], 2)
        runs = [
            subject.run(gradients, longctx.lightning_attention, made, decays(subject), upstream)
            for _ in range(20 if subject.device.type == "cuda" else 2)
        ]
        for again in runs[1:]:
            for one, other in zip(runs[0], again, strict=True):
                assert torch.equal(one, other)
