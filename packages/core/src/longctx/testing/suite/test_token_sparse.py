"""Attention inside sets of tokens: rows outside are 0, all tokens are dense attention."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx import TokenSetPlan
from longctx.plans import HeadAxis
from longctx.reference import token_sparse as oracle
from longctx.reference.flash import flash_attention as dense
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_flash_offsets import far_apart
from longctx.testing.suite.test_lightning import capture

__all__ = ["TestTokenSparseAttention"]

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
AXES: list[HeadAxis] = ["shared", "kv", "query"]
FEATURES: dict[str, tuple[str, ...]] = {
    "shared": (),
    "kv": ("per-kv-head",),
    "query": ("per-query-head",),
}
_BAND_EDGES = (16, 128, 1024)


def token_sets(
    subject: Subject, batch: int, sets: int, k_len: int, capacity: int, empty: bool = True
) -> tuple[Tensor, Tensor]:
    """Return random ascending sets, ``(indices, counts)``, of uneven sizes; the first is empty."""
    counts = torch.randint(0, capacity + 1, (batch, sets), generator=subject.generator)
    counts[-1, -1] = capacity
    if empty:
        counts[0, 0] = 0
    order = torch.rand(batch, sets, k_len, generator=subject.generator).argsort(2)
    inside = torch.arange(capacity) < counts.unsqueeze(2)
    indices = order[..., :capacity].where(inside, k_len).sort(2).values
    indices = indices.masked_fill(indices == k_len, -1)
    return indices.to(subject.device, torch.int32), counts.to(subject.device, torch.int32)


def random_plan(
    subject: Subject, made: Triple, head_axis: HeadAxis, capacity: int, empty: bool = True
) -> TokenSetPlan:
    """Return random sets for q, k, v."""
    q, k, _ = made
    sets = {"shared": 1, "kv": k.shape[2], "query": q.shape[2]}[head_axis]
    drawn = token_sets(subject, q.shape[0], sets, k.shape[1], capacity, empty)
    return TokenSetPlan(*drawn, head_axis)


def references(made: Triple, plan: TokenSetPlan, **options: Any) -> tuple[Pair, Pair]:
    """Return the oracle's ``(out, lse)`` in fp64 and in the precision at test."""
    q, k, v = (t.double() for t in made)
    exact = oracle.token_sparse_attention(q, k, v, plan, **options)
    return exact, oracle.token_sparse_attention(*made, plan, **options)


def check_results(subject: Subject, got: Any, exact: Pair, low: Pair) -> None:
    """Check results in bands of rows, since the first ones average few values and are large."""
    out, lse = got
    assert (out.dtype, lse.dtype) == (subject.dtype, torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    rows = out.shape[1]
    for a, b in pairwise((0, *(edge for edge in _BAND_EDGES if edge < rows), rows)):
        subject.check(out[:, a:b], exact[0][:, a:b], low[0][:, a:b], f"out of rows {a} to {b}")
        subject.check(lse[..., a:b], exact[1][..., a:b], low[1][..., a:b], f"lse, {a} to {b}")
    outside = exact[1] == -torch.inf
    assert (out.transpose(1, 2)[outside] == 0).all()


def run_and_check(subject: Subject, made: Triple, plan: TokenSetPlan, **options: Any) -> Pair:
    """Run token_sparse_attention, check it against the oracle, return its result."""
    got = subject.run(longctx.token_sparse_attention_with_lse, *made, plan, **options)
    check_results(subject, got, *references(made, plan, **options))
    return got[0], got[1]


@pytest.mark.longctx_op("token_sparse_attention")
class TestTokenSparseAttention:
    """Sets that all heads share, and sets a KV or query head."""

    @pytest.mark.parametrize("head_axis", AXES)
    @pytest.mark.parametrize("length", LENGTHS[:-1])
    def test_sizes(self, subject: Subject, length: int, head_axis: HeadAxis) -> None:
        subject.require(*FEATURES[head_axis])
        subject.require_length(length)
        made = subject.qkv(1, length, length)
        plan = random_plan(subject, made, head_axis, -(-length // 2), empty=False)
        run_and_check(subject, made, plan)

    @pytest.mark.parametrize("head_axis", AXES)
    @pytest.mark.parametrize(
        ("q_heads", "kv_heads", "head_dim"),
        [(1, 1, 64), (4, 4, 128), (4, 1, 64), (8, 1, 128), (16, 1, 64), (6, 2, 128)],
    )
    def test_grouped_heads(
        self, subject: Subject, q_heads: int, kv_heads: int, head_dim: int, head_axis: HeadAxis
    ) -> None:
        heads = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
        subject.require(*FEATURES[head_axis], **heads)
        subject.require_length(129)
        made = subject.qkv(2, 129, 129, **heads)
        run_and_check(subject, made, random_plan(subject, made, head_axis, 77), scale=0.3)

    @pytest.mark.parametrize("head_axis", AXES)
    @pytest.mark.parametrize(("q_len", "k_len"), [(1, 63), (65, 129), (127, 1000), (33, 4099)])
    def test_last_queries_of_a_longer_context(
        self, subject: Subject, q_len: int, k_len: int, head_axis: HeadAxis
    ) -> None:
        subject.require(*FEATURES[head_axis])
        subject.require_length(k_len)
        made = subject.qkv(2 if k_len < 1000 else 1, q_len, k_len)
        run_and_check(subject, made, random_plan(subject, made, head_axis, k_len * 3 // 4))

    @pytest.mark.parametrize("head_axis", AXES)
    def test_every_token_counts_once(self, subject: Subject, head_axis: HeadAxis) -> None:
        """With scores of 0, ``exp(lse)`` of a row is the number of keys that it sees."""
        subject.require(*FEATURES[head_axis])
        subject.require_length(1000)
        q, k, v = subject.qkv(2, 300, 1000)
        made = torch.zeros_like(q), k, v
        plan = random_plan(subject, made, head_axis, 600)
        _, lse = run_and_check(subject, made, plan)
        count = plan.to_mask(300, 1000).sum(-1)
        count = count.repeat_interleave(4 // count.shape[1], 1)
        assert torch.equal(lse.double().exp().round(), count.double())

    @pytest.mark.parametrize("head_axis", AXES)
    @pytest.mark.parametrize("length", [63, 129, 255])
    def test_all_tokens_are_dense_attention(
        self, subject: Subject, length: int, head_axis: HeadAxis
    ) -> None:
        subject.require(*FEATURES[head_axis])
        subject.require_length(length)
        made = subject.qkv(1, length, length)
        sets = _sets(head_axis)
        indices = torch.arange(length, dtype=torch.int32, device=subject.device)
        counts = torch.full((1, sets), length, dtype=torch.int32, device=subject.device)
        plan = TokenSetPlan(indices.expand(1, sets, -1).contiguous(), counts, head_axis)
        got = subject.run(longctx.token_sparse_attention_with_lse, *made, plan)
        q, k, v = (t.double() for t in made)
        check_results(subject, got, dense(q, k, v, causal=True), dense(*made, causal=True))

    @pytest.mark.parametrize("head_axis", AXES)
    def test_unselected_tokens_may_hold_nan(self, subject: Subject, head_axis: HeadAxis) -> None:
        """Token 0 among them, where the padding of -1 would be read without care."""
        subject.require(*FEATURES[head_axis])
        subject.require_length(255)
        made = subject.qkv(2, 255, 255)
        indices, counts = token_sets(subject, 2, _sets(head_axis), 254, 30)
        plan = TokenSetPlan(indices.where(indices < 0, indices + 1), counts, head_axis)
        used = plan.to_mask(255, 255).diagonal(dim1=2, dim2=3).any(1)
        exact, low = references(made, plan)
        for tensor in made:
            tensor[~used] = math.nan
        assert made[1][:, 0].isnan().all()
        got = subject.run(longctx.token_sparse_attention_with_lse, *made, plan)
        check_results(subject, got, exact, low)

    @pytest.mark.parametrize("head_axis", AXES)
    @pytest.mark.parametrize("q_len", [129, 33])
    def test_sets_without_tokens_or_queries(
        self, subject: Subject, q_len: int, head_axis: HeadAxis
    ) -> None:
        """Every set is empty, or ends before the first query."""
        subject.require(*FEATURES[head_axis])
        subject.require_length(129)
        made = subject.qkv(2, q_len, 129)
        first = 129 - q_len
        indices, counts = token_sets(subject, 2, _sets(head_axis), max(first, 20), 20)
        if first == 0:
            counts = torch.zeros_like(counts)
        plan = TokenSetPlan(indices, counts, head_axis)
        out, lse = subject.run(longctx.token_sparse_attention_with_lse, *made, plan)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()

    def test_chunks_of_queries_make_the_whole(self, subject: Subject) -> None:
        subject.require("per-query-head")
        subject.require_length(255)
        q, k, v = subject.qkv(1, 255, 255)
        plan = random_plan(subject, (q, k, v), "query", 150)
        outs, lses = [], []
        for a, b in pairwise((0, 1, 64, 129, 200, 255)):
            kept = plan.indices.where(plan.indices < b, -1)
            part = TokenSetPlan(kept, (kept >= 0).sum(2).int(), "query")
            made = q[:, a:b], k[:, :b], v[:, :b]
            out, lse = subject.run(longctx.token_sparse_attention_with_lse, *made, part)
            outs.append(out)
            lses.append(lse)
        joined = torch.cat(outs, 1), torch.cat(lses, 2)
        check_results(subject, joined, *references((q, k, v), plan))

    @pytest.mark.parametrize(
        ("head_dim", "value_dim", "kv_heads"), [(192, 128, 4), (128, 64, 2), (576, 512, 1)]
    )
    def test_narrow_values(
        self, subject: Subject, head_dim: int, value_dim: int, kv_heads: int
    ) -> None:
        """MLA: values apart, or the first channels of the keys."""
        sizes = {"head_dim": head_dim, "value_dim": value_dim, "kv_heads": kv_heads}
        subject.require("mla", "per-query-head", **sizes)
        subject.require_length(129)
        q, k, v = subject.qkv(1, 129, 129, **sizes)
        plan = random_plan(subject, (q, k, v), "query", 70)
        run_and_check(subject, (q, k, v), plan)
        run_and_check(subject, (q, k, k[..., :value_dim]), plan)

    def test_views(self, subject: Subject) -> None:
        """Head-major queries; keys in a longer cache, whose free slots hold NaN."""
        subject.require("per-query-head")
        subject.require_length(129)
        q = subject.randn(2, 4, 65, 64).transpose(1, 2)
        k, v = (subject.randn(2, 200, 2, 64) for _ in range(2))
        for tensor in (k, v):
            tensor[:, 129:] = math.nan
        made = q, k[:, :129], v[:, :129]
        run_and_check(subject, made, random_plan(subject, made, "query", 70))

    def test_sets_of_keys_alone(self, subject: Subject) -> None:
        """Scope "kv": every query attends the set, as a plan of stripes."""
        subject.require("per-query-head")
        subject.require("stripe-plan", "per-query-head", op="block_sparse_attention")
        subject.require_length(129)
        made = subject.qkv(2, 65, 129)
        plan = TokenSetPlan(*token_sets(subject, 2, 4, 129, 70), "query", "kv")
        run_and_check(subject, made, plan)

    @pytest.mark.parametrize("length", [4099, 131_072])
    def test_long_contexts(self, subject: Subject, length: int) -> None:
        """The work is that of the sets, of at most 999 tokens a head."""
        subject.require("per-query-head", q_heads=2, kv_heads=1)
        subject.require_length(4099)
        q, k, v = subject.qkv(1, length, length, q_heads=2, kv_heads=1)
        indices, counts = token_sets(subject, 1, 2, length, 999, empty=False)
        plan = TokenSetPlan(indices, counts, "query")
        out, lse = subject.run(longctx.token_sparse_attention_with_lse, q, k, v, plan)
        for h in (0, 1):
            rows = indices[0, h, : int(counts[0, h])].long()
            made = q[:, rows, h : h + 1], k[:, rows], v[:, rows]
            wide = (t.double() for t in made)
            exact, low = dense(*wide, causal=True), dense(*made, causal=True)
            got = out[:, rows, h : h + 1].contiguous(), lse[:, h : h + 1, rows].contiguous()
            check_results(subject, got, exact, low)
            outside = torch.ones(length, dtype=torch.bool, device=rows.device)
            outside[rows] = False
            assert (out[:, outside, h] == 0).all()
            assert (lse[:, h, outside] == -torch.inf).all()

    @pytest.mark.parametrize(("name", "axis"), [(n, a) for n in "qkv" for a in (0, 1, 2)])
    def test_inputs_far_apart(self, subject: Subject, name: str, axis: int) -> None:
        """One input at a time has its last entry along an axis 2**31 elements away."""
        subject.require("per-query-head")
        subject.require_length(129)
        made = dict(zip("qkv", subject.qkv(2, 129, 129), strict=True))
        last = torch.arange(60, 129, dtype=torch.int32, device=subject.device)
        counts = torch.full((2, 4), 69, dtype=torch.int32, device=subject.device)
        plan = TokenSetPlan(last.expand(2, 4, -1).contiguous(), counts, "query")
        made[name] = far_apart(subject, made[name], axis)
        run_and_check(subject, (made["q"], made["k"], made["v"]), plan)

    def test_same_inputs_give_the_same_bits(self, subject: Subject) -> None:
        subject.require("per-query-head")
        subject.require_length(1000)
        if not subject.support.deterministic:
            pytest.skip("not declared: determinism")
        made = subject.qkv(1, 129, 1000)
        plan = random_plan(subject, made, "query", 700)
        first = subject.run(longctx.token_sparse_attention_with_lse, *made, plan)
        for _ in range(20 if subject.device.type == "cuda" else 2):
            again = subject.run(longctx.token_sparse_attention_with_lse, *made, plan)
            assert torch.equal(first.out, again.out)
            assert torch.equal(first.lse, again.lse)

    def test_captured_sets_may_change(self, subject: Subject) -> None:
        """Other tokens and other counts, fewer and more, in the capacity of the plan."""
        subject.require_cuda()
        subject.require("per-query-head")
        made = subject.qkv(2, 255, 255)
        indices, counts = token_sets(subject, 2, 4, 255, 200)
        plan = TokenSetPlan(indices, counts, "query")
        graph, got = capture(
            lambda: longctx.token_sparse_attention_with_lse(*made, plan, backend=subject.backend)
        )
        for _ in range(3):
            for held, fresh in zip(
                (indices, counts), token_sets(subject, 2, 4, 255, 200), strict=True
            ):
                held.copy_(fresh)
            graph.replay()
            check_results(subject, got, *references(made, plan))


def _sets(head_axis: HeadAxis) -> int:
    """Return the number of sets for 4 query and 2 KV heads."""
    return {"shared": 1, "kv": 2, "query": 4}[head_axis]
