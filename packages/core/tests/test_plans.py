"""Plans: density against the mask, and what makes a plan unfit for a call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.plans import (
    BlockPlan,
    Plan,
    RetentionPlan,
    StripePlan,
    TokenSetPlan,
    TopKPlan,
    WindowPlan,
    causal_pairs,
)

thorough = settings(max_examples=80, deadline=None)


@st.composite
def lengths(draw):
    """Return (q_len, k_len); a few calls have more queries than keys."""
    k_len = draw(st.integers(1, 40))
    return draw(st.integers(1, k_len + 3)), k_len


@st.composite
def sets(draw, shape, size, *, ascending=False):
    """Return (indices [*shape, C], counts [*shape]): unique, below ``size``, then padding."""
    capacity = draw(st.integers(0, size))
    rows, counts = [], []
    for _ in range(torch.Size(shape).numel()):
        row = draw(st.lists(st.integers(0, size - 1), max_size=capacity, unique=True))
        rows.append((sorted(row) if ascending else row) + [-1] * (capacity - len(row)))
        counts.append(len(row))
    indices = torch.tensor(rows, dtype=torch.int32).reshape(*shape, capacity)
    return indices, torch.tensor(counts, dtype=torch.int32).reshape(shape)


@st.composite
def window_plans(draw):
    heads = draw(st.none() | st.lists(st.integers(0, 45), min_size=1, max_size=3))
    return WindowPlan(
        window=draw(st.integers(0, 45)),
        sink_tokens=draw(st.integers(0, 45)),
        last_queries=draw(st.integers(0, 45)),
        head_windows=None if heads is None else torch.tensor(heads, dtype=torch.int32),
    )


@st.composite
def block_plans(draw, q_len, k_len):
    block_q, block_k = draw(st.integers(1, 17)), draw(st.integers(1, 17))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), -(-q_len // block_q))
    indices, counts = draw(sets(shape, -(-k_len // block_k)))
    return BlockPlan(counts, indices, block_q, block_k, "query")


@st.composite
def stripe_plans(draw, k_len):
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    return StripePlan(*draw(sets(shape, k_len)), *draw(sets(shape, k_len)), "query")


@st.composite
def token_plans(draw, k_len):
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    scope = draw(st.sampled_from(["qkv", "kv"]))
    return TokenSetPlan(*draw(sets(shape, k_len, ascending=True)), "query", scope)


@st.composite
def topk_plans(draw, q_len, k_len):
    """Return a causal plan with holes: no chosen page begins behind its query."""
    page_size = draw(st.integers(1, 5))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    pages = -(-k_len // page_size)
    indices, _ = draw(sets((batch, q_len, heads), pages))
    position = torch.arange(k_len - q_len, k_len).view(1, -1, 1, 1)
    return TopKPlan(indices.where(indices * page_size <= position, -1), "kv", page_size)


def mask_density(plan, q_len, k_len):
    mask = plan.to_mask(q_len, k_len)
    assert mask.dtype == torch.bool
    assert mask.shape[2:] == (q_len, k_len)
    return mask.sum().item() / (mask.shape[0] * mask.shape[1] * causal_pairs(q_len, k_len))


def assert_density(plan, q_len, k_len):
    assert isinstance(plan, Plan)
    assert plan.density(q_len, k_len) == pytest.approx(mask_density(plan, q_len, k_len))


@given(lengths())
def test_causal_pairs(sizes):
    q_len, k_len = sizes
    rows = torch.arange(k_len - q_len, k_len).unsqueeze(1)
    assert causal_pairs(q_len, k_len) == (torch.arange(k_len) <= rows).sum()


@thorough
@given(st.data(), lengths())
@pytest.mark.parametrize("kind", ["window", "block", "stripe", "token", "topk"])
def test_density_is_the_share_of_the_mask(kind, data, sizes):
    q_len, k_len = sizes
    strategy = {
        "window": window_plans,
        "block": lambda: block_plans(q_len, k_len),
        "stripe": lambda: stripe_plans(k_len),
        "token": lambda: token_plans(k_len),
        "topk": lambda: topk_plans(q_len, k_len),
    }[kind]
    assert_density(data.draw(strategy()), q_len, k_len)


@thorough
@given(st.data(), lengths())
def test_density_of_a_retention_plan_is_the_share_of_slots(data, sizes):
    q_len, k_len = sizes
    plan = RetentionPlan(*data.draw(sets((2, 2), k_len, ascending=True)))
    mask = plan.to_mask(q_len, k_len)
    assert mask.shape == (2, 2, q_len, k_len)
    assert plan.density(q_len, k_len) == pytest.approx(mask.double().mean().item())


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_masks_by_hand():
    window = WindowPlan(window=1, sink_tokens=1, last_queries=1)
    assert window.to_mask(3, 4)[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert window.density(3, 4) == 1.0
    assert window.to_mask(2, 4)[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    block = BlockPlan(int32(1, 1).view(1, 1, 2), int32(1, 0).view(1, 1, 2, 1), 2, 2, "shared")
    assert block.to_mask(4, 4)[0, 0].int().tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 0, 0],
    ]
    assert block.to_mask(4, 4, causal=False)[0, 0].int().tolist()[:2] == [[0, 0, 1, 1]] * 2
    column = (int32(1).view(1, 1, 1), int32(1).view(1, 1))
    stripe = StripePlan(*column, int32(0, 2).view(1, 1, 2), int32(2).view(1, 1), "shared")
    assert stripe.to_mask(3, 3)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
    tokens = TokenSetPlan(int32(0, 2, -1).view(1, 1, 3), int32(2).view(1, 1), "shared")
    assert tokens.to_mask(3, 3)[0, 0].int().tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
    topk = TopKPlan(int32(0, -1, 1, 0).view(1, 2, 1, 2), page_size=2)
    assert topk.to_mask(2, 3)[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]
    kept = RetentionPlan(int32(0, 2, -1).view(1, 1, 3), int32(2).view(1, 1))
    assert kept.to_mask(1, 4)[0, 0].int().tolist() == [[1, 0, 1, 0]]


def test_an_empty_call_has_density_0():
    none = torch.zeros(1, 1, 0, dtype=torch.int32)
    zero = torch.zeros(1, 1, dtype=torch.int32)
    for plan in (
        WindowPlan(window=3),
        TokenSetPlan(none, zero, "shared"),
        BlockPlan(none, none.unsqueeze(3), 4, 4, "shared"),
        StripePlan(none, zero, none, zero, "shared"),
        TopKPlan(torch.zeros(1, 0, 1, 3, dtype=torch.int32)),
        RetentionPlan(none, zero),
    ):
        assert plan.density(0, 0) == 0.0


def sets_of(batch, heads, capacity=2):
    indices = torch.arange(capacity, dtype=torch.int32).expand(batch, heads, -1)
    return indices, torch.full((batch, heads), capacity, dtype=torch.int32)


def blocks_of(batch, heads, rows, axis):
    indices, counts = sets_of(batch * heads, rows)
    return BlockPlan(
        counts.reshape(batch, heads, rows), indices.reshape(batch, heads, rows, 2), 4, 4, axis
    )


FITTING = {
    "window": WindowPlan(1, head_windows=torch.ones(4, dtype=torch.int32)),
    "tokens": TokenSetPlan(*sets_of(2, 2), "kv"),
    "blocks": blocks_of(2, 4, 3, "query"),
    "stripes": StripePlan(*sets_of(2, 1), *sets_of(2, 1), "shared"),
    "topk": TopKPlan(torch.zeros(2, 10, 1, 3, dtype=torch.int32)),
    "retention": RetentionPlan(*sets_of(2, 2)),
}
UNFIT = {
    "window heads": (WindowPlan(1, head_windows=torch.ones(3, dtype=torch.int32)), "3 head sets"),
    "tokens batch": (TokenSetPlan(*sets_of(1, 2), "kv"), "batch 1, the tensors have batch 2"),
    "tokens heads": (TokenSetPlan(*sets_of(2, 2), "query"), "needs 4 here"),
    "blocks batch": (blocks_of(3, 4, 3, "query"), "made for batch 3"),
    "blocks heads": (blocks_of(2, 4, 3, "kv"), "'kv' needs 2"),
    "blocks length": (blocks_of(2, 4, 2, "query"), "2 query blocks, 10 queries .* need 3"),
    "stripes heads": (StripePlan(*sets_of(2, 1), *sets_of(2, 2), "shared"), "has 2 head sets"),
    "stripes batch": (StripePlan(*sets_of(2, 1), *sets_of(1, 1), "shared"), "made for batch 1"),
    "topk length": (TopKPlan(torch.zeros(2, 9, 1, 3, dtype=torch.int32)), "rows for 9 queries"),
    "topk heads": (TopKPlan(torch.zeros(2, 10, 2, 3, dtype=torch.int32)), "has 2 head sets"),
    "retention heads": (RetentionPlan(*sets_of(2, 4)), "'kv' needs 2"),
}
CALL = {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 10, "k_len": 12}


@pytest.mark.parametrize("plan", FITTING.values(), ids=FITTING)
def test_check_accepts_a_fitting_plan(plan):
    assert plan.check(**CALL) is None


@pytest.mark.parametrize(("plan", "message"), UNFIT.values(), ids=UNFIT)
def test_check_refuses_an_unfit_plan(plan, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan.check(**CALL)
    assert "\n" not in str(caught.value)


INDICES, COUNTS = sets_of(1, 1)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: WindowPlan(-1), ValueError, "WindowPlan.window must be at least 0"),
        (lambda: WindowPlan(1, sink_tokens=-1), ValueError, "sink_tokens must be at least 0"),
        (lambda: WindowPlan(1, head_windows=torch.ones(2)), TypeError, "int32"),
        (lambda: WindowPlan(1, head_windows=INDICES), ValueError, r"must be \(q_heads\)"),
        (lambda: TokenSetPlan(INDICES.long(), COUNTS, "kv"), TypeError, "indices must be int32"),
        (lambda: TokenSetPlan(INDICES, COUNTS[0], "kv"), ValueError, r"must be \(batch, heads\)"),
        (lambda: TokenSetPlan(INDICES, *sets_of(1, 2)[1:], "kv"), ValueError, "one count a set"),
        (lambda: RetentionPlan(INDICES, COUNTS.expand(2, 1)), ValueError, "one count a set"),
        (lambda: BlockPlan(COUNTS, INDICES, 4, 4, "kv"), ValueError, "batch, heads, q_blocks"),
        (lambda: BlockPlan(INDICES, INDICES.unsqueeze(2), 4, 4, "kv"), ValueError, "one count"),
        (lambda: BlockPlan(INDICES, INDICES.unsqueeze(3), 0, 4, "kv"), ValueError, "positive"),
        (
            lambda: StripePlan(INDICES, COUNTS, INDICES, COUNTS.expand(1, 2), "kv"),
            ValueError,
            "one count a set in slash",
        ),
        (lambda: TopKPlan(INDICES), ValueError, "batch, q_len, heads, k"),
        (lambda: TopKPlan(INDICES.unsqueeze(3), page_size=0), ValueError, "at least 1"),
        (lambda: TopKPlan([[[[0]]]]), TypeError, "indices must be an int32 tensor, got list"),
        (
            lambda: BlockPlan(None, INDICES, 2, 2, "shared"),
            TypeError,
            "counts must be an int32 tensor, got NoneType",
        ),
    ],
)
def test_malformed_plans(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("plan", FITTING.values(), ids=FITTING)
def test_plans_are_frozen(plan):
    with pytest.raises(AttributeError):
        plan.indices = None
