"""What block-sparse attention refuses, and how it behaves inside ``torch.compile``."""

from __future__ import annotations

import math

import pytest
import torch

import longctx
from longctx import BlockPlan, StripePlan, TokenSetPlan, WindowPlan


def inputs(q_len, k_len, *, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((q_len, 4, 8), (k_len, 2, 8), (k_len, 2, 5))
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def set_of(*entries, count=None, batch=1):
    indices = torch.tensor(entries, dtype=torch.int32).expand(batch, 1, -1)
    counts = torch.full((batch, 1), len(entries) if count is None else count, dtype=torch.int32)
    return indices, counts


def blocks_of(*entries, count=None):
    indices, counts = set_of(*entries, count=count)
    return BlockPlan(counts.unsqueeze(2), indices.unsqueeze(2), 16, 4, "shared")


PLANS = {
    "block": blocks_of(0, 2),
    "stripe": StripePlan(*set_of(3, 7), *set_of(0, 5), "shared"),
    "window": WindowPlan(2, head_windows=torch.tensor([1, 2, 3, 4], dtype=torch.int32)),
}


def test_registered_operators():
    q, k, v = inputs(12, 40)
    blocks, stripes, window = PLANS.values()
    sets = (stripes.vertical, stripes.vertical_counts, stripes.slash, stripes.slash_counts)
    ops = torch.ops.longctx
    for operator, arguments in (
        (ops.block_sparse_forward, (blocks.counts, blocks.indices, 16, 4, True, 0.3)),
        (ops.stripe_sparse_forward, (*sets, 0.3)),
        (ops.window_sparse_forward, (window.head_windows, 4, 2, 1, 0.3)),
        (ops.window_sparse_forward, (None, 4, 2, 1, 0.3)),
    ):
        torch.library.opcheck(operator.default, (q, k, v, *arguments, "torch"))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_traces_without_a_break(plan):
    q, k, v = inputs(12, 40)
    attend = longctx.block_sparse_attention_with_lse
    traced = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(traced(q, k, v, plan), attend(q, k, v, plan), strict=True):
        torch.testing.assert_close(got, wanted)


NONE = set_of(0, count=0)
BAD = {
    "plan type": (
        lambda: TokenSetPlan(*set_of(1), "shared"),
        {},
        TypeError,
        "plan must be a BlockPlan, StripePlan or WindowPlan, got TokenSetPlan",
    ),
    "mask": (lambda: torch.ones(8, 8), {}, TypeError, "got Tensor"),
    "stripe not causal": (
        lambda: StripePlan(*NONE, *NONE, "shared"),
        {"causal": False},
        ValueError,
        "a StripePlan is causal by definition",
    ),
    "window not causal": (
        lambda: WindowPlan(1),
        {"causal": False},
        ValueError,
        "a WindowPlan is causal by definition",
    ),
    "scale": (lambda: WindowPlan(1), {"scale": math.nan}, ValueError, "scale must be finite"),
    "batch": (
        lambda: StripePlan(*set_of(0, batch=2), *set_of(0, batch=2), "shared"),
        {},
        ValueError,
        "made for batch 2, the tensors have batch 1",
    ),
    "heads": (lambda: StripePlan(*NONE, *NONE, "kv"), {}, ValueError, "head_axis='kv' needs 2"),
    "window heads": (
        lambda: WindowPlan(1, head_windows=torch.ones(3, dtype=torch.int32)),
        {},
        ValueError,
        "3 head sets",
    ),
    "window below 0": (
        lambda: WindowPlan(1, head_windows=torch.tensor([1, -1, 1, 1], dtype=torch.int32)),
        {},
        ValueError,
        "head_windows must be at least 0",
    ),
    "length": (
        lambda: BlockPlan(
            torch.zeros(1, 1, 2, dtype=torch.int32),
            torch.zeros(1, 1, 2, 1, dtype=torch.int32),
            16,
            4,
            "shared",
        ),
        {},
        ValueError,
        "2 query blocks, 8 queries in blocks of 16 need 1",
    ),
    "block too high": (
        lambda: blocks_of(0, 2),
        {},
        ValueError,
        "BlockPlan.indices must be below 2, the number of key blocks .*, got 2",
    ),
    "block below -1": (lambda: blocks_of(-2), {}, ValueError, "below 2.*got -2"),
    "block twice": (lambda: blocks_of(1, 0, 1), {}, ValueError, "got one twice"),
    "count": (lambda: blocks_of(0, count=2), {}, ValueError, "room for 1 entries"),
    "count below 0": (lambda: blocks_of(0, count=-1), {}, ValueError, "run from -1"),
    "column": (
        lambda: StripePlan(*set_of(8), *NONE, "shared"),
        {},
        ValueError,
        "StripePlan.vertical must be below 8, the number of keys",
    ),
    "diagonal": (
        lambda: StripePlan(*NONE, *set_of(3, 9), "shared"),
        {},
        ValueError,
        "StripePlan.slash must be below 8, the number of distances",
    ),
    "plan device": (
        lambda: WindowPlan(1, head_windows=torch.ones(4, dtype=torch.int32, device="meta")),
        {},
        ValueError,
        "q and plan.head_windows must be on one device",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans(case):
    plan, options, error, message = BAD[case]
    q, k, v = inputs(8, 8)
    with pytest.raises(error, match=message) as caught:
        longctx.block_sparse_attention(q, k, v, plan(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"q": torch.zeros(8, 4, 8)},
            ValueError,
            r"q must be \(batch, q_len, q_heads, head_dim\)",
        ),
        ({"k": [0]}, TypeError, "k must be a Tensor"),
        ({"q": torch.zeros(1, 8, 3, 8)}, ValueError, "q_heads must be a multiple of kv_heads"),
        ({"v": torch.zeros(1, 7, 2, 5)}, ValueError, "agree in k_len"),
        ({"k": torch.zeros(1, 8, 2, 4)}, ValueError, "agree in head_dim"),
        ({"v": torch.zeros(1, 8, 2, 5).half()}, TypeError, "share a dtype"),
        ({"k": torch.zeros(1, 8, 2, 8, device="meta")}, ValueError, "must be on one device"),
    ],
)
def test_bad_tensors(change, error, message):
    tensors = dict(zip("qkv", inputs(8, 8), strict=True))
    with pytest.raises(error, match=message):
        longctx.block_sparse_attention(**(tensors | change), plan=WindowPlan(1))


def test_a_gradient_is_refused():
    q, k, v = inputs(8, 8)
    with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
        longctx.block_sparse_attention(q.requires_grad_(), k, v, WindowPlan(1))
    with torch.no_grad():
        longctx.block_sparse_attention(q, k, v, WindowPlan(1))
