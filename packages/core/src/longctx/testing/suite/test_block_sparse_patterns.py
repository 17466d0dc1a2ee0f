"""Attention under stripe and window plans, and what block-sparse attention refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.plans import BlockPlan, HeadAxis, StripePlan, WindowPlan
from longctx.reference import block_sparse as oracle
from longctx.reference import flash as flash_oracle
from longctx.testing.subject import Subject
from longctx.testing.suite.test_block_sparse import (
    AXES,
    AXIS_FEATURES,
    check_plan,
    head_sets,
    random_sets,
)
from longctx.testing.suite.test_flash import check_rows, coarse_qkv
from longctx.testing.suite.test_flash_refusals import check_refusal

__all__ = ["TestBlockSparseRefusals", "TestStripePlans", "TestWindowPlans"]

SHAPES = [(1, 1), (255, 255), (33, 500), (129, 65)]


def stripe_plan(
    subject: Subject,
    batch: int,
    k_len: int,
    axis: HeadAxis,
    columns: int = 30,
    diagonals: int = 20,
    *,
    sets: int | None = None,
) -> StripePlan:
    """Return random key columns and diagonals of uneven numbers."""
    shape = (batch, sets or head_sets(axis))
    vertical = random_sets(subject, shape, k_len, columns, -1)
    return StripePlan(*vertical, *random_sets(subject, shape, k_len, diagonals, -1), axis)


def one_set(subject: Subject, *entries: int) -> tuple[Tensor, Tensor]:
    """Return a shared set and its count."""
    made = torch.tensor(entries, dtype=torch.int32, device=subject.device).view(1, 1, -1)
    return made, torch.full((1, 1), len(entries), dtype=torch.int32, device=subject.device)


@pytest.mark.longctx_op("block_sparse_attention")
class TestStripePlans:
    """Vertical key columns and slash diagonals; a pair on both counts once."""

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
    def test_equals_its_mask(
        self, subject: Subject, q_len: int, k_len: int, axis: HeadAxis
    ) -> None:
        subject.require("stripe-plan", *AXIS_FEATURES[axis])
        subject.require_length(q_len, k_len)
        plan = stripe_plan(subject, 2, k_len, axis)
        check_plan(subject, *subject.qkv(2, q_len, k_len), plan)

    @pytest.mark.parametrize(("columns", "diagonals"), [(0, 40), (40, 0), (0, 0), (300, 300)])
    def test_one_kind_alone(self, subject: Subject, columns: int, diagonals: int) -> None:
        subject.require("stripe-plan", "per-kv-head")
        subject.require_length(300)
        plan = stripe_plan(subject, 1, 300, "kv", columns, diagonals)
        check_plan(subject, *subject.qkv(1, 129, 300), plan)

    @pytest.mark.parametrize(("q_heads", "kv_heads"), [(3, 3), (8, 2), (16, 1)])
    @pytest.mark.parametrize("axis", AXES)
    def test_grouped_heads(
        self, subject: Subject, axis: HeadAxis, q_heads: int, kv_heads: int
    ) -> None:
        subject.require("stripe-plan", *AXIS_FEATURES[axis], q_heads=q_heads, kv_heads=kv_heads)
        subject.require_length(255)
        made = subject.qkv(1, 65, 255, q_heads=q_heads, kv_heads=kv_heads)
        sets = head_sets(axis, q_heads, kv_heads)
        check_plan(subject, *made, stripe_plan(subject, 1, 255, axis, sets=sets))

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_head_dims(self, subject: Subject, head_dim: int) -> None:
        subject.require("stripe-plan", head_dim=head_dim)
        subject.require_length(255)
        made = subject.qkv(1, 129, 255, head_dim=head_dim)
        check_plan(subject, *made, stripe_plan(subject, 1, 255, "shared"), scale=0.2)

    def test_a_pair_on_a_column_and_a_diagonal_counts_once(self, subject: Subject) -> None:
        """Columns 0..63 and diagonals 0..63: most pairs are on both."""
        subject.require("stripe-plan")
        subject.require_length(255)
        every = one_set(subject, *range(64))
        check_plan(subject, *subject.qkv(1, 255, 255), StripePlan(*every, *every, "shared"))

    @pytest.mark.parametrize("which", ["columns", "diagonals", "both"])
    def test_a_full_plan_is_dense_attention(self, subject: Subject, which: str) -> None:
        subject.require("stripe-plan")
        subject.require_length(300)
        made = subject.qkv(1, 129, 300)
        every, none = one_set(subject, *range(300)), one_set(subject)
        vertical = none if which == "diagonals" else every
        slash = none if which == "columns" else every
        got = check_plan(subject, *made, StripePlan(*vertical, *slash, "shared"))
        exact = flash_oracle.flash_attention(*(t.double() for t in made), causal=True)
        check_rows(
            subject, got, exact, flash_oracle.flash_attention(*coarse_qkv(*made), causal=True)
        )

    def test_rows_before_every_stripe_are_zero(self, subject: Subject) -> None:
        subject.require("stripe-plan")
        subject.require_length(129)
        plan = StripePlan(*one_set(subject, 40, 100), *one_set(subject, 70), "shared")
        out, lse = check_plan(subject, *subject.qkv(1, 129, 129), plan)
        assert (out[:, :40] == 0).all()
        assert (lse[..., :40] == -torch.inf).all()

    def test_prefill_in_chunks_is_one_prefill(self, subject: Subject) -> None:
        subject.require("stripe-plan", "per-kv-head")
        subject.require_length(255)
        q, k, v = subject.qkv(1, 255, 255)
        plan = stripe_plan(subject, 1, 255, "kv")
        parts = []
        for start, stop in pairwise((0, 63, 64, 200, 255)):
            chunk = replace(
                plan,
                vertical=plan.vertical.where(plan.vertical < stop, -1),
                slash=plan.slash.where(plan.slash < stop, -1),
            )
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


WINDOWS: list[dict[str, Any]] = [
    {"window": 0},
    {"window": 5, "sink_tokens": 3},
    {"window": 63, "sink_tokens": 64},
    {"window": 64, "sink_tokens": 1, "last_queries": 2},
    {"window": 127, "sink_tokens": 130, "last_queries": 70},
    {"window": 10**6, "sink_tokens": 10**6, "last_queries": 10**6},
]


@pytest.mark.longctx_op("block_sparse_attention")
class TestWindowPlans:
    """First tokens, a sliding window, and last queries that see everything."""

    @pytest.mark.parametrize("options", WINDOWS, ids=str)
    @pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
    def test_equals_its_mask(
        self, subject: Subject, q_len: int, k_len: int, options: dict[str, Any]
    ) -> None:
        subject.require("window-plan")
        subject.require_length(q_len, k_len)
        check_plan(subject, *subject.qkv(2, q_len, k_len), WindowPlan(**options))

    @pytest.mark.parametrize("windows", [(0, 9, 70, 500), (3, 3, 66, 66)])
    @pytest.mark.parametrize("last_queries", [0, 5])
    def test_a_window_a_query_head(
        self, subject: Subject, last_queries: int, windows: tuple[int, ...]
    ) -> None:
        subject.require("window-plan", "per-query-head")
        subject.require_length(255)
        chosen = torch.tensor(windows, dtype=torch.int32, device=subject.device)
        for sink_tokens in (0, 3, 65):
            plan = WindowPlan(4, sink_tokens, last_queries, chosen)
            check_plan(subject, *subject.qkv(1, 129, 255), plan)

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads", "head_dim"),
        [(3, 3, 64), (8, 2, 128), (16, 1, 64), (4, 2, 256)],
    )
    def test_heads(self, subject: Subject, q_heads: int, kv_heads: int, head_dim: int) -> None:
        subject.require("window-plan", q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        subject.require_length(255)
        made = subject.qkv(1, 129, 255, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        check_plan(subject, *made, WindowPlan(40, 4), scale=0.2)

    def test_long(self, subject: Subject) -> None:
        subject.require("window-plan", q_heads=1, kv_heads=1)
        subject.require_length(4099)
        made = subject.qkv(1, 500, 4099, q_heads=1, kv_heads=1)
        check_plan(subject, *made, WindowPlan(1000, 100, 3))

    @pytest.mark.parametrize("options", [{"window": 254}, {"window": 0, "last_queries": 255}])
    def test_a_full_plan_is_dense_attention(
        self, subject: Subject, options: dict[str, Any]
    ) -> None:
        subject.require("window-plan")
        subject.require_length(255)
        made = subject.qkv(1, 255, 255)
        got = check_plan(subject, *made, WindowPlan(**options))
        exact = flash_oracle.flash_attention(*(t.double() for t in made), causal=True)
        check_rows(
            subject, got, exact, flash_oracle.flash_attention(*coarse_qkv(*made), causal=True)
        )

    def test_prefill_in_chunks_is_one_prefill(self, subject: Subject) -> None:
        subject.require("window-plan")
        subject.require_length(255)
        q, k, v = subject.qkv(1, 255, 255)
        plan = WindowPlan(40, 5)
        parts = [
            subject.run(
                longctx.block_sparse_attention_with_lse,
                q[:, start:stop], k[:, :stop], v[:, :stop], plan,
            )
            for start, stop in pairwise((0, 1, 2, 64, 200, 255))
        ]  # fmt: skip
        outs, lses = zip(*parts, strict=True)
        exact = oracle.block_sparse_attention(q.double(), k.double(), v.double(), plan)
        low = oracle.block_sparse_attention(*coarse_qkv(q, k, v), plan)
        check_rows(subject, (torch.cat(outs, 1), torch.cat(lses, 2)), exact, low)


Made = Callable[[Subject], Any]


def _blocks(subject: Subject, *entries: int) -> BlockPlan:
    indices, counts = one_set(subject, *entries)
    return BlockPlan(counts.unsqueeze(2), indices.unsqueeze(2), 16, 4, "shared")


BAD_PLANS: list[tuple[str, type[Exception], Made, dict[str, Any]]] = [
    (
        "plan must be a BlockPlan, StripePlan or WindowPlan, got Tensor",
        TypeError,
        lambda s: s.randn(8, 8),
        {},
    ),
    (
        "a WindowPlan is causal by definition",
        ValueError,
        lambda s: WindowPlan(1),
        {"causal": False},
    ),
    (
        "a StripePlan is causal by definition",
        ValueError,
        lambda s: StripePlan(*one_set(s, 0), *one_set(s, 0), "shared"),
        {"causal": False},
    ),
    ("scale must be finite", ValueError, lambda s: WindowPlan(1), {"scale": math.nan}),
    (
        "head_axis='kv' needs 2",
        ValueError,
        lambda s: StripePlan(*one_set(s, 0), *one_set(s, 0), "kv"),
        {},
    ),
    (
        "made for batch 1, the tensors have batch 2",
        ValueError,
        lambda s: _blocks(s, 0),
        {"batch": 2},
    ),
    (
        "1 query blocks, 20 queries in blocks of 16 need 2",
        ValueError,
        lambda s: _blocks(s, 0),
        {"length": 20},
    ),
    (
        "q and plan.indices must be on one device",
        ValueError,
        lambda s: replace(_blocks(s, 0), indices=_blocks(s, 0).indices.to("meta")),
        {},
    ),
]

PLANS: dict[str, Made] = {
    "block-plan": lambda s: _blocks(s, 0),
    "stripe-plan": lambda s: StripePlan(*one_set(s, 0), *one_set(s, 0), "shared"),
    "window-plan": lambda s: WindowPlan(3),
}


@pytest.mark.longctx_op("block_sparse_attention")
class TestBlockSparseRefusals:
    """Plans that do not fit, and requests that the support table does not hold."""

    @pytest.mark.parametrize(
        ("message", "error", "plan", "change"), BAD_PLANS, ids=[row[0] for row in BAD_PLANS]
    )
    def test_bad_plans_say_what_is_wrong(
        self,
        subject: Subject,
        message: str,
        error: type[Exception],
        plan: Made,
        change: dict[str, Any],
    ) -> None:
        options = dict(change)
        length = options.pop("length", 8)
        made = subject.qkv(options.pop("batch", 1), length, length)
        with pytest.raises(error) as caught:
            subject.run(longctx.block_sparse_attention, *made, plan(subject), **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("feature", PLANS)
    def test_undeclared_plans_are_refused(self, subject: Subject, feature: str) -> None:
        if feature in subject.support.features:
            pytest.skip(f"{feature} is declared")
        made, plan = subject.qkv(1, 8, 8), PLANS[feature](subject)
        check_refusal(
            subject,
            lambda: subject.run(longctx.block_sparse_attention, *made, plan),
            features=(feature,),
        )

    @pytest.mark.parametrize("feature", PLANS)
    def test_a_gradient_is_refused(self, subject: Subject, feature: str) -> None:
        q, k, v = subject.qkv(1, 8, 8)
        plan = PLANS[feature](subject)
        check_refusal(
            subject,
            lambda: subject.run(longctx.block_sparse_attention, q.requires_grad_(), k, v, plan),
            features=(feature,),
            gradient=True,
        )
