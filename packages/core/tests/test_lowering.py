"""Lowering: never a pair lost, not a block too many, and the cost as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longctx
from longctx.lowering import (
    LoweringCost,
    heads_to_kv,
    stripes_to_blocks,
    topk_to_blocks,
    window_to_blocks,
)
from longctx.plans import BlockPlan, StripePlan, TokenSetPlan, TopKPlan, WindowPlan

thorough = settings(max_examples=60, deadline=None)
block_sizes = st.tuples(st.integers(1, 17), st.integers(1, 17))


@st.composite
def lengths(draw):
    k_len = draw(st.integers(1, 50))
    return draw(st.integers(1, k_len)), k_len


def random_sets(shape, size, generator, ascending=False):
    """Return unique random ``indices [*shape, size]`` and random counts."""
    counts = torch.randint(0, size + 1, shape, generator=generator)
    indices = torch.rand(*shape, size, generator=generator).argsort(-1)
    real = torch.arange(size) < counts.unsqueeze(-1)
    indices = indices.where(real, -1)
    if ascending:
        indices = indices.where(real, size).sort(-1).values.where(real, -1)
    return indices.int(), counts.int()


def to_query_heads(mask, heads):
    return mask.repeat_interleave(heads // mask.shape[1], 1)


def assert_tightest_blocks(plan, lowered, cost, q_len, k_len):
    """Check that the blocks kept are those that hold a kept pair."""
    original = plan.to_mask(q_len, k_len)
    mask = lowered.to_mask(q_len, k_len)
    assert (mask | ~original).all()
    q_blocks, k_blocks = -(-q_len // lowered.block_q), -(-k_len // lowered.block_k)
    padded = torch.nn.functional.pad(
        original, (0, k_blocks * lowered.block_k - k_len, 0, q_blocks * lowered.block_q - q_len)
    )
    tiles = padded.unflatten(3, (k_blocks, -1)).unflatten(2, (q_blocks, -1))
    holds_a_pair = tiles.any(5).any(3)
    assert torch.equal(lowered.counts, holds_a_pair.sum(-1, dtype=torch.int32))
    for kept, indices in zip(
        holds_a_pair.flatten(0, 2), lowered.indices.flatten(0, 2).tolist(), strict=True
    ):
        wanted = kept.nonzero().flatten().tolist()
        assert indices == wanted + [-1] * (len(indices) - len(wanted))
    assert cost == LoweringCost(plan.density(q_len, k_len), lowered.density(q_len, k_len))
    assert cost.after >= cost.before * (1 - 1e-12)


@thorough
@given(lengths(), block_sizes, st.integers(0, 2**16))
def test_stripes_to_blocks(sizes, blocks, seed):
    q_len, k_len = sizes
    generator = torch.Generator().manual_seed(seed)
    vertical = random_sets((2, 2), k_len, generator)
    plan = StripePlan(*vertical, *random_sets((2, 2), k_len, generator), "kv")
    lowered, cost = stripes_to_blocks(
        plan, block_q=blocks[0], block_k=blocks[1], q_len=q_len, k_len=k_len
    )
    assert lowered.head_axis == "kv"
    assert_tightest_blocks(plan, lowered, cost, q_len, k_len)


@thorough
@given(
    lengths(),
    block_sizes,
    st.tuples(*[st.integers(0, 50)] * 3),
    st.none() | st.lists(st.integers(0, 50), min_size=1, max_size=3),
)
def test_window_to_blocks(sizes, blocks, options, heads):
    q_len, k_len = sizes
    head_windows = None if heads is None else torch.tensor(heads, dtype=torch.int32)
    plan = WindowPlan(*options, head_windows=head_windows)
    lowered, cost = window_to_blocks(
        plan, block_q=blocks[0], block_k=blocks[1], q_len=q_len, k_len=k_len
    )
    assert lowered.head_axis == ("shared" if heads is None else "query")
    assert_tightest_blocks(plan, lowered, cost, q_len, k_len)


@thorough
@given(lengths(), block_sizes, st.integers(1, 5), st.integers(0, 2**16))
def test_topk_to_blocks(sizes, blocks, page_size, seed):
    q_len, k_len = sizes
    generator = torch.Generator().manual_seed(seed)
    indices, _ = random_sets((2, q_len, 2), -(-k_len // page_size), generator)
    position = torch.arange(k_len - q_len, k_len).view(1, -1, 1, 1)
    plan = TopKPlan(indices.where(indices * page_size <= position, -1), "kv", page_size)
    lowered, cost = topk_to_blocks(plan, block_q=blocks[0], block_k=blocks[1], k_len=k_len)
    assert lowered.head_axis == "kv"
    assert_tightest_blocks(plan, lowered, cost, q_len, k_len)


@thorough
@given(lengths(), block_sizes, st.integers(0, 2**16))
def test_heads_to_kv_is_the_union_of_each_group(sizes, blocks, seed):
    q_len, k_len = sizes
    generator = torch.Generator().manual_seed(seed)
    counts_shape = (2, 4, -(-q_len // blocks[0]))
    block_sets = random_sets(counts_shape, -(-k_len // blocks[1]), generator)
    vertical = random_sets((2, 4), k_len, generator)
    tokens = random_sets((2, 4), k_len, generator, ascending=True)
    for plan in (
        BlockPlan(*block_sets[::-1], *blocks, "query"),
        StripePlan(*vertical, *random_sets((2, 4), k_len, generator), "query"),
        TokenSetPlan(*tokens, "query", "kv"),
    ):
        lowered, cost = heads_to_kv(plan, kv_heads=2, q_len=q_len, k_len=k_len)
        lowered.check(batch=2, q_heads=4, kv_heads=2, q_len=q_len, k_len=k_len)
        assert type(lowered) is type(plan)
        assert lowered.head_axis == "kv"
        original = plan.to_mask(q_len, k_len)
        mask = lowered.to_mask(q_len, k_len)
        assert torch.equal(mask, original.unflatten(1, (2, 2)).any(2))
        assert cost == LoweringCost(plan.density(q_len, k_len), lowered.density(q_len, k_len))
        assert cost.after >= cost.before * (1 - 1e-12)


def test_heads_to_kv_of_tokens_that_restrict_queries_too():
    tokens = random_sets((1, 4), 20, torch.Generator().manual_seed(1), ascending=True)
    plan = TokenSetPlan(*tokens, "query", "qkv")
    lowered, cost = heads_to_kv(plan, kv_heads=2, q_len=12, k_len=20)
    assert lowered.scope == "qkv"
    mask = to_query_heads(lowered.to_mask(12, 20), 4)
    assert (mask | ~plan.to_mask(12, 20)).all()
    assert cost.factor > 1


def test_heads_to_kv_of_windows():
    plan = WindowPlan(2, 1, head_windows=torch.tensor([1, 5, 3, 3], dtype=torch.int32))
    lowered, cost = heads_to_kv(plan, kv_heads=2, q_len=9, k_len=9)
    assert lowered.head_windows.tolist() == [5, 5, 3, 3]
    assert (lowered.to_mask(9, 9) | ~plan.to_mask(9, 9)).all()
    assert cost.factor > 1
    with pytest.raises(ValueError, match="4 query heads must be a multiple of kv_heads=3"):
        heads_to_kv(plan, kv_heads=3, q_len=9, k_len=9)


def test_plans_that_are_not_for_query_heads_stay_as_they_are():
    window = WindowPlan(2)
    sets = random_sets((1, 2), 9, torch.Generator().manual_seed(0))
    for plan in (window, StripePlan(*sets, *sets, "kv")):
        lowered, cost = heads_to_kv(plan, kv_heads=2, q_len=9, k_len=9)
        assert lowered is plan
        assert cost.factor == 1


def test_lowered_plans_run():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 30, 4, 8, generator=generator)
    k = v = torch.randn(2, 50, 2, 8, generator=generator)
    sets = random_sets((2, 4), 50, generator)
    plan = StripePlan(*sets, *random_sets((2, 4), 50, generator), "query")
    lowered, _ = heads_to_kv(plan, kv_heads=2, q_len=30, k_len=50)
    blocks, _ = stripes_to_blocks(lowered, block_q=16, block_k=8, q_len=30, k_len=50)
    windows, _ = window_to_blocks(
        WindowPlan(5, 2), block_q=16, block_k=8, q_len=30, k_len=50, batch=2
    )
    dense = longctx.flash_attention_with_lse(q, k, v, causal=True).lse
    for each in (plan, lowered, blocks, windows):
        lse = longctx.block_sparse_attention_with_lse(q, k, v, each).lse
        assert (lse <= dense + 1e-5).all()


def test_bad_arguments():
    behind = TopKPlan(torch.tensor([1, 0], dtype=torch.int32).view(1, 2, 1, 1))
    with pytest.raises(ValueError, match="behind the query"):
        topk_to_blocks(behind, block_q=2, block_k=2, k_len=2)
    with pytest.raises(ValueError, match="block sizes must be positive"):
        window_to_blocks(WindowPlan(1), block_q=0, block_k=2, q_len=2, k_len=2)
    assert LoweringCost(0.0, 0.0).factor == 1.0
    assert LoweringCost(0.0, 0.5).factor == float("inf")
