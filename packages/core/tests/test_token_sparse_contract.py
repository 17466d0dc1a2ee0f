"""The token-sparse ops trace, pass opcheck, and refuse bad input in one clear sentence."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import longctx
from longctx import TokenSetPlan, TopKPlan, UnsupportedError
from longctx.ops import _token_sparse_library as library
from longctx.torch_backend.token_sparse import select_tokens_forward


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(37)


def inputs(q_len=20, k_len=20):
    return (
        torch.randn(1, q_len, 4, 16),
        torch.randn(1, k_len, 2, 16),
        torch.randn(1, k_len, 2, 16),
    )


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("scope", ["qkv", "kv"])
def test_score_select_attend_trace_as_one_graph(scope):
    def layer(q, k, v):
        scores = longctx.token_scores(q[:, -4:], k, pool=3)
        plan = longctx.select_tokens(scores, drop_mass=0.4, min_tokens=2, recent=4)
        plan = TokenSetPlan(plan.indices, plan.counts, "query", scope)
        return longctx.token_sparse_attention_with_lse(q, k, v, plan), plan

    q, k, v = inputs()
    (out, lse), plan = compiled(layer)(q, k, v)
    (expected, expected_lse), expected_plan = layer(q, k, v)
    assert 4 < plan.counts[0, 0] < 20
    assert torch.equal(plan.indices, expected_plan.indices)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("q_len", [20, 7])
def test_inner_traces_at_the_plans_capacity(q_len):
    q, k, v = inputs(q_len)
    indices = torch.arange(0, 20, 3).int().expand(1, 4, -1).contiguous()
    plan = TokenSetPlan(indices, torch.tensor([[7, 6, 5, 4]]).int(), "query")

    def run(q, k, v, plan):
        return longctx.token_sparse_attention(
            q, k, v, plan, inner=lambda *t: longctx.flash_attention(*t, causal=True)
        )

    torch.testing.assert_close(compiled(run)(q, k, v, plan), run(q, k, v, plan))


def test_opcheck():
    q, k, v = inputs()
    check = torch.library.opcheck
    check(library.score_op, (q[:, -4:], k, 3, 0.25, "torch"))
    check(library.select_op, (torch.rand(1, 4, 16), 0.3, 2, 4, "torch"))
    indices = torch.arange(0, 20, 3).int().expand(1, 4, -1).contiguous()
    counts = torch.tensor([[7, 6, 5, 4]]).int()
    check(library.attend_op, (q, k, v, indices, counts, 0.25, "torch"))


def test_selecting_needs_no_host():
    # a meta tensor has no values to read: whatever touched them would raise
    scores = torch.empty(2, 4, 16, device="meta")
    indices, counts = library.select_op(scores, 0.3, 2, 4, "torch")
    assert (indices.shape, counts.shape) == ((2, 4, 20), (2, 4))
    indices, counts = select_tokens_forward(scores, drop_mass=0.3, min_tokens=2, recent=4)
    assert (indices.shape, counts.shape) == ((2, 4, 20), (2, 4))


def test_sets_of_scores_by_kv_head_are_labelled_so():
    q, k, v = inputs()
    scores = longctx.token_scores(q[:, -4:], k).view(1, 2, 2, 16).mean(2)
    plan = longctx.select_tokens(scores, drop_mass=0.4, min_tokens=0, recent=4, head_axis="kv")
    assert plan.head_axis == "kv"
    assert longctx.token_sparse_attention(q, k, v, plan).shape == (1, 20, 4, 16)


def score(q=None, k=None, **options):
    recent, keys, _ = inputs(4)
    return longctx.token_scores(recent if q is None else q, keys if k is None else k, **options)


def select(scores=None, drop_mass=0.1, **options):
    scores = torch.rand(1, 4, 16) if scores is None else scores
    return longctx.select_tokens(scores, drop_mass=drop_mass, **options)


def attend(*change, **options):
    """Call with one set for all heads; ``change`` holds (name, value) pairs of tensors or plan."""
    q, k, v = inputs()
    given = {"q": q, "k": k, "v": v, "plan": plan_of([0, 3, 19])} | dict(change)
    return longctx.token_sparse_attention(**given, **options)


def plan_of(row, count=None, sets=1, batch=1, head_axis="shared", scope="qkv"):
    indices = torch.tensor(row, dtype=torch.int32).expand(batch, sets, len(row)).contiguous()
    counts = torch.full((batch, sets), len(row) if count is None else count, dtype=torch.int32)
    return TokenSetPlan(indices, counts, head_axis, scope)


R = torch.randn
REFUSALS = [
    (lambda: score(q=R(4, 4, 16)), ValueError, r"q_recent must be \(batch, window, q_heads"),
    (lambda: score(q=R(1, 4, 3, 16)), ValueError, "q_heads must be a multiple of kv_heads"),
    (lambda: score(q=R(1, 4, 4, 8)), ValueError, "must agree in head_dim"),
    (lambda: score(q=R(2, 4, 4, 16)), ValueError, "must agree in batch"),
    (lambda: score(q=R(1, 4, 4, 16).half()), TypeError, "must share a dtype"),
    (lambda: score(q=R(1, 4, 4, 16, device="meta")), ValueError, "on one device"),
    (lambda: score(q=R(1, 21, 4, 16)), ValueError, "must fit into k_len, got 21 queries and 20"),
    (lambda: score(q=R(1, 0, 4, 16)), ValueError, "window of q_recent must be at least 1"),
    (lambda: score(pool=4), ValueError, "pool must be odd and at least 1, got 4"),
    (lambda: score(pool=-1), ValueError, "pool must be odd and at least 1, got -1"),
    (lambda: score(scale=math.nan), ValueError, "scale must be finite, got nan"),
    (
        lambda: score(q=R(1, 4, 4, 16, requires_grad=True)),
        UnsupportedError,
        "no backward pass",
    ),
    (
        lambda: score(q=R(1, 4, 4, 16, device="meta"), k=R(1, 20, 2, 16, device="meta")),
        UnsupportedError,
        "tensors are on meta",
    ),
    (lambda: select(R(4, 16)), ValueError, r"scores must be \(batch, heads, prefix_len\)"),
    (lambda: select(torch.rand(1, 4, 16).half()), TypeError, "scores must be float32"),
    (lambda: select(-torch.rand(1, 4, 16)), ValueError, "must be finite and at least 0"),
    (lambda: select(torch.full((1, 1, 3), math.nan)), ValueError, "must be finite"),
    (lambda: select(drop_mass=1.5), ValueError, "drop_mass must lie between 0 and 1, got 1.5"),
    (lambda: select(drop_mass=-0.1), ValueError, "drop_mass must lie between 0 and 1"),
    (lambda: select(drop_mass=math.nan), ValueError, "drop_mass must lie between 0 and 1"),
    (lambda: select(min_tokens=-1), ValueError, "min_tokens must be at least 0, got -1"),
    (lambda: select(recent=-1), ValueError, "recent must be at least 0, got -1"),
    (lambda: select(head_axis="keys"), ValueError, "no head axis is called 'keys'"),
    (lambda: attend(("q", R(20, 4, 16))), ValueError, r"q must be \(batch, q_len"),
    (lambda: attend(("q", R(1, 21, 4, 16))), ValueError, "q_len must be at most k_len, got 21"),
    (lambda: attend(("v", R(1, 19, 2, 16))), ValueError, "must agree in k_len"),
    (lambda: attend(("v", R(1, 20, 2, 16).half())), TypeError, "must share a dtype"),
    (lambda: attend(scale=math.inf), ValueError, "scale must be finite, got inf"),
    (lambda: attend(("q", R(1, 20, 4, 16, requires_grad=True))), UnsupportedError, "no backward"),
    (
        lambda: attend(("plan", TopKPlan(torch.zeros(1, 20, 1, 2).int()))),
        TypeError,
        "plan must be a TokenSetPlan, got TopKPlan",
    ),
    (lambda: attend(("plan", plan_of([0], batch=2))), ValueError, "made for batch 2"),
    (
        lambda: attend(("plan", plan_of([0], sets=4, head_axis="kv"))),
        ValueError,
        "has 4 head sets but head_axis='kv' needs 2",
    ),
    (
        lambda: attend(("plan", plan_of([0, 20]))),
        ValueError,
        "from 0 to 20: the plan was made for",
    ),
    (lambda: attend(("plan", plan_of([-1, 3]))), ValueError, "between 0 and 19 up to the count"),
    (lambda: attend(("plan", plan_of([5, 3]))), ValueError, "must ascend .* got 5 then 3"),
    (lambda: attend(("plan", plan_of([3, 3]))), ValueError, "without repeats, got 3 then 3"),
    (lambda: attend(("plan", plan_of([3], 2))), ValueError, "between 0 and the capacity 1"),
    (lambda: attend(scale=1.0, inner=max), ValueError, "scale is for the backend's own attention"),
    (lambda: attend(backend="torch", inner=max), ValueError, "give it to inner instead"),
    (
        lambda: attend(("plan", plan_of([3], scope="kv")), inner=max),
        ValueError,
        "inner needs a plan of scope 'qkv', got 'kv'",
    ),
    (
        lambda: attend(inner=lambda q, k, v: q[:, 1:]),
        ValueError,
        r"inner must return .* = \(1, 3, 4, 16\), got \(1, 2, 4, 16\)",
    ),
]


@pytest.mark.parametrize(("case", "error", "words"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_bad_input_is_refused_in_one_sentence(case, error, words):
    with pytest.raises(error, match=words) as caught:
        case()
    assert error is UnsupportedError or "\n" not in str(caught.value)


def test_inner_that_returns_no_lse_is_named():
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"inner must return \(out, lse\)"):
        longctx.token_sparse_attention_with_lse(
            q, k, v, plan_of([0, 3]), inner=lambda q, k, v: (q, None)
        )


def test_scope_is_part_of_the_plan_not_of_the_call():
    q, k, v = inputs()
    plan = plan_of([0, 3, 8])
    keys_only = longctx.token_sparse_attention(q, k, v, dataclasses.replace(plan, scope="kv"))
    both = longctx.token_sparse_attention(q, k, v, plan)
    rows = plan.indices[0, 0].long()
    torch.testing.assert_close(keys_only[:, rows], both[:, rows])
    assert keys_only[:, 1].ne(0).any()
    assert both[:, 1].eq(0).all()
