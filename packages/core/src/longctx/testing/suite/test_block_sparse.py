"""Attention under block plans: block sizes, odd tails, head axes, uneven counts, chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.plans import BlockPlan, HeadAxis, StripePlan, WindowPlan
from longctx.protocols.attention import AttentionOutput
from longctx.reference import block_sparse as oracle
from longctx.reference import flash as flash_oracle
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_flash import check_rows, coarse_qkv
from longctx.testing.suite.test_flash_offsets import far_apart

__all__ = ["TestBlockPlans"]

AXES: tuple[HeadAxis, ...] = ("shared", "kv", "query")
AXIS_FEATURES: dict[HeadAxis, tuple[str, ...]] = {
    "shared": (),
    "kv": ("per-kv-head",),
    "query": ("per-query-head",),
}
BLOCKS = [(64, 64), (128, 128), (64, 128), (128, 64)]
_NONSENSE = 2**30


def head_sets(axis: HeadAxis, q_heads: int = 4, kv_heads: int = 2) -> int:
    """Return how many sets a plan of a head axis holds."""
    return {"shared": 1, "kv": kv_heads, "query": q_heads}[axis]


def random_sets(
    subject: Subject, shape: Sequence[int], size: int, capacity: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Return unordered, unique ``indices [*shape, capacity]`` below ``size``, and any counts."""
    order = torch.rand(*shape, size, generator=subject.generator).argsort(-1)[..., :capacity]
    counts = torch.randint(0, order.shape[-1] + 1, tuple(shape), generator=subject.generator)
    past = torch.arange(order.shape[-1]) >= counts.unsqueeze(-1)
    indices = order.masked_fill(past, padding)
    return indices.to(subject.device, torch.int32), counts.to(subject.device, torch.int32)


def block_plan(
    subject: Subject,
    batch: int,
    q_len: int,
    k_len: int,
    axis: HeadAxis,
    block_q: int = 64,
    block_k: int = 64,
    *,
    sets: int | None = None,
) -> BlockPlan:
    """Return random key blocks a query block; what lies behind a count is nonsense."""
    blocks = -(-k_len // block_k)
    shape = (batch, sets or head_sets(axis), -(-q_len // block_q))
    indices, counts = random_sets(subject, shape, blocks, blocks, _NONSENSE)
    return BlockPlan(counts, indices, block_q, block_k, axis)


def check_plan(
    subject: Subject,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | StripePlan | WindowPlan,
    **options: Any,
) -> AttentionOutput:
    """Check the attention under a plan against its mask; return it.

    Besides, with scores of 0 ``exp(lse)`` is the number of keys that a query sees, exactly.
    """
    attend = longctx.block_sparse_attention_with_lse
    got: AttentionOutput = subject.run(attend, q, k, v, plan, **options)
    assert got.out.dtype == q.dtype
    exact = oracle.block_sparse_attention(q.double(), k.double(), v.double(), plan, **options)
    low = oracle.block_sparse_attention(*coarse_qkv(q, k, v), plan, **options)
    check_rows(subject, got, exact, low)
    flat = subject.run(attend, torch.zeros_like(q), k, v, plan, **options)
    seen = oracle.plan_mask(plan, q, k, **options_of_the_mask(options)).sum(-1)
    assert torch.equal(flat.lse.double().exp().round(), seen.double().expand_as(flat.lse)), (
        "pairs were miscounted"
    )
    return got


def options_of_the_mask(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that change what a plan keeps."""
    return {name: value for name, value in options.items() if name == "causal"}


@pytest.mark.longctx_op("block_sparse_attention")
class TestBlockPlans:
    """FlexAttention's layout: counts and numbers of key blocks a query block."""

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize("blocks", BLOCKS, ids=str)
    @pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (255, 255), (33, 500), (129, 65)])
    def test_equals_its_mask(
        self, subject: Subject, q_len: int, k_len: int, blocks: tuple[int, int], axis: HeadAxis
    ) -> None:
        subject.require("block-plan", *AXIS_FEATURES[axis])
        subject.require_length(q_len, k_len)
        plan = block_plan(subject, 2, q_len, k_len, axis, *blocks)
        check_plan(subject, *subject.qkv(2, q_len, k_len), plan)

    @pytest.mark.parametrize("blocks", [(64, 64), (128, 128)], ids=str)
    @pytest.mark.parametrize("length", LENGTHS[-2:])
    def test_long(self, subject: Subject, length: int, blocks: tuple[int, int]) -> None:
        subject.require("block-plan", q_heads=1, kv_heads=1)
        subject.require_length(length)
        q_len = min(length, 500)
        made = subject.qkv(1, q_len, length, q_heads=1, kv_heads=1)
        plan = block_plan(subject, 1, q_len, length, "shared", *blocks)
        check_plan(subject, *made, plan)

    @pytest.mark.parametrize("axis", AXES)
    def test_whole_blocks_without_causality(self, subject: Subject, axis: HeadAxis) -> None:
        subject.require("block-plan", *AXIS_FEATURES[axis])
        subject.require_length(255)
        plan = block_plan(subject, 2, 129, 255, axis)
        check_plan(subject, *subject.qkv(2, 129, 255), plan, causal=False)

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize(("q_heads", "kv_heads"), [(3, 3), (4, 1), (8, 2), (16, 1)])
    def test_grouped_heads(
        self, subject: Subject, q_heads: int, kv_heads: int, axis: HeadAxis
    ) -> None:
        subject.require("block-plan", *AXIS_FEATURES[axis], q_heads=q_heads, kv_heads=kv_heads)
        subject.require_length(255)
        made = subject.qkv(1, 129, 255, q_heads=q_heads, kv_heads=kv_heads)
        sets = head_sets(axis, q_heads, kv_heads)
        check_plan(subject, *made, block_plan(subject, 1, 129, 255, axis, sets=sets))

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_head_dims(self, subject: Subject, scale: float | None, head_dim: int) -> None:
        subject.require("block-plan", "per-kv-head", head_dim=head_dim)
        subject.require_length(255)
        made = subject.qkv(1, 129, 255, head_dim=head_dim)
        check_plan(subject, *made, block_plan(subject, 1, 129, 255, "kv"), scale=scale)

    @pytest.mark.parametrize("blocks", BLOCKS, ids=str)
    @pytest.mark.parametrize(("q_len", "k_len"), [(255, 255), (65, 1000)])
    def test_a_full_plan_is_dense_attention(
        self, subject: Subject, q_len: int, k_len: int, blocks: tuple[int, int]
    ) -> None:
        subject.require("block-plan")
        subject.require_length(k_len)
        made = subject.qkv(1, q_len, k_len)
        rows, columns = -(-q_len // blocks[0]), -(-k_len // blocks[1])
        every = torch.arange(columns, dtype=torch.int32, device=subject.device)
        plan = BlockPlan(
            torch.full((1, 1, rows), columns, dtype=torch.int32, device=subject.device),
            every.expand(1, 1, rows, columns), *blocks, "shared",
        )  # fmt: skip
        got = check_plan(subject, *made, plan)
        exact = flash_oracle.flash_attention(*(t.double() for t in made), causal=True)
        check_rows(
            subject, got, exact, flash_oracle.flash_attention(*coarse_qkv(*made), causal=True)
        )

    def test_query_blocks_that_keep_nothing_are_zero(self, subject: Subject) -> None:
        subject.require("block-plan", "per-kv-head")
        subject.require_length(255)
        plan = block_plan(subject, 2, 255, 255, "kv")
        counts = plan.counts.clone()
        counts[0, 1], counts[1, :, 1:3] = 0, 0
        plan = replace(plan, counts=counts)
        out, lse = check_plan(subject, *subject.qkv(2, 255, 255), plan)
        assert (out[0, :, 2:] == 0).all()
        assert (out[1, 64:192] == 0).all()
        assert (lse[0, 2:] == -torch.inf).all()
        assert (lse[1, :, 64:192] == -torch.inf).all()

    def test_slots_of_minus_one_are_skipped(self, subject: Subject) -> None:
        subject.require("block-plan")
        subject.require_length(255)
        indices = torch.tensor([[-1, 0, -1], [1, -1, 0], [2, 0, 1], [-1, -1, -1]])
        plan = BlockPlan(
            torch.full((1, 1, 4), 3, dtype=torch.int32, device=subject.device),
            indices.view(1, 1, 4, 3).to(subject.device, torch.int32), 64, 64, "shared",
        )  # fmt: skip
        check_plan(subject, *subject.qkv(1, 255, 255), plan)

    def test_blocks_that_nothing_keeps_may_hold_anything(self, subject: Subject) -> None:
        subject.require("block-plan", "per-kv-head")
        subject.require_length(1000)
        q, k, v = subject.qkv(2, 129, 1000)
        plan = block_plan(subject, 2, 129, 1000, "kv")
        plan = replace(plan, counts=plan.counts.clamp(max=3))
        kept = plan.to_mask(129, 1000, causal=False).any(2).transpose(1, 2)  # [B, Sk, Hkv]
        assert not kept.all()
        clean = check_plan(subject, q, k, v, plan)
        k, v = (t.masked_fill(~kept.unsqueeze(3), torch.nan) for t in (k, v))
        got = subject.run(longctx.block_sparse_attention_with_lse, q, k, v, plan)
        assert torch.equal(got.out, clean.out)
        assert torch.equal(got.lse, clean.lse)

    @pytest.mark.parametrize("cuts", [(128,), (64, 128, 320)])
    def test_prefill_in_chunks_is_one_prefill(
        self, subject: Subject, cuts: tuple[int, ...]
    ) -> None:
        subject.require("block-plan", "per-kv-head")
        subject.require_length(450)
        q, k, v = subject.qkv(1, 450, 450)
        plan = block_plan(subject, 1, 450, 450, "kv")
        parts = []
        for start, stop in pairwise((0, *cuts, 450)):
            rows = slice(start // 64, -(-stop // 64))
            # a block that begins behind the chunk is of no use to it
            indices = plan.indices[:, :, rows]
            indices = indices.where(indices < -(-stop // 64), -1)
            chunk = replace(plan, counts=plan.counts[:, :, rows].contiguous(), indices=indices)
            parts.append(
                subject.run(
                    longctx.block_sparse_attention_with_lse,
                    q[:, start:stop], k[:, :stop], v[:, :stop], chunk,
                )
            )  # fmt: skip
        outs, lses = zip(*parts, strict=True)
        exact = oracle.block_sparse_attention(q.double(), k.double(), v.double(), plan)
        low = oracle.block_sparse_attention(*coarse_qkv(q, k, v), plan)
        check_rows(subject, (torch.cat(outs, 1), torch.cat(lses, 2)), exact, low)

    def test_views_of_a_plan(self, subject: Subject) -> None:
        """A slice of a larger plan, and one set that is expanded over batch and heads."""
        subject.require("block-plan", "per-query-head")
        subject.require_length(255)
        made = subject.qkv(2, 129, 255)
        large = block_plan(subject, 3, 129, 255, "query", sets=6)
        part = replace(large, counts=large.counts[1:, 1:5], indices=large.indices[1:, 1:5])
        check_plan(subject, *made, part)
        one = replace(
            large,
            counts=large.counts[:1, :1].expand(2, 4, -1),
            indices=large.indices[:1, :1].expand(2, 4, -1, -1),
        )
        check_plan(subject, *made, one)

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "sequence", "heads"])
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_offsets_beyond_32_bits(self, subject: Subject, name: str, axis: int) -> None:
        subject.require("block-plan")
        tensors = dict(zip("qkv", subject.qkv(2, 129, 255), strict=True))
        tensors[name] = far_apart(subject, tensors[name], axis)
        plan = block_plan(subject, 2, 129, 255, "shared")
        check_plan(subject, tensors["q"], tensors["k"], tensors["v"], plan)

    def test_same_inputs_give_the_same_bits(self, subject: Subject) -> None:
        subject.require("block-plan", "per-kv-head")
        subject.require_length(1000)
        if not subject.support.deterministic:
            pytest.skip("not declared: determinism")
        made = subject.qkv(1, 129, 1000)
        plan = block_plan(subject, 1, 129, 1000, "kv")
        runs = [
            subject.run(longctx.block_sparse_attention_with_lse, *made, plan)
            for _ in range(20 if subject.device.type == "cuda" else 2)
        ]
        for run in runs[1:]:
            assert torch.equal(run.out, runs[0].out)
            assert torch.equal(run.lse, runs[0].lse)
