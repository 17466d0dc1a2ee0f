"""Token Sparse Attention: scores and sets as published, attention as the plan's mask says."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import longctx
from longctx import TokenSetPlan
from longctx.reference import token_sparse as oracle
from longctx.reference.flash import flash_attention as dense
from longctx.testing.budget import assert_within_budget


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(31)


def published(q, k, v, window, pool, min_tokens, tau):
    """The authors' algorithm for one sequence, line by line: heads first, K/V repeated.

    Returns the set of each head and the scattered output; rows of equal scores aside, one answer.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    heads, length, dim = q.shape[1], q.shape[2], q.shape[3]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    logits = q[:, :, -window:] @ k.transpose(2, 3) / math.sqrt(dim)
    triangle = torch.ones(window, window, dtype=torch.bool).triu(1)
    logits[..., -window:] = logits[..., -window:].masked_fill(triangle, float("-inf"))
    s = logits.softmax(-1)[..., : length - window].mean(2)
    s = F.avg_pool1d(s, kernel_size=pool, stride=1, padding=pool // 2)
    g = s.mean(1)
    g = g / g.sum(-1, keepdim=True)
    k_sparse = int((g.sort().values.cumsum(-1) < tau).sum()) + 1
    keep = max(min_tokens, (length - window) - k_sparse)
    best = (s / s.sum(-1, keepdim=True)).topk(keep, dim=-1).indices
    recent = torch.arange(length - window, length).expand(1, heads, window)
    chosen = torch.cat([best, recent], -1).sort(-1).values
    rows = chosen.unsqueeze(-1).expand(-1, -1, -1, dim)
    compact = [t.gather(2, rows) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*compact, is_causal=True)
    return chosen, torch.zeros_like(q).scatter(2, rows, out).transpose(1, 2)


def case(q_len, k_len, q_heads=4, kv_heads=2, dim=16, batch=1, dtype=torch.float32):
    q = torch.randn(batch, q_len, q_heads, dim).to(dtype)
    k = torch.randn(batch, k_len, kv_heads, dim).to(dtype)
    return q, k, torch.randn(batch, k_len, kv_heads, dim).to(dtype)


@pytest.mark.parametrize("budget", ["256", "0.02"])
@pytest.mark.parametrize(
    ("length", "window", "pool", "min_tokens", "tau"),
    [(300, 16, 7, 32, 0.1), (300, 16, 7, 32, 0.9), (513, 32, 1, 8, 0.4), (64, 5, 3, 1, 0.005)],
)
def test_equals_the_published_algorithm(
    monkeypatch, length, window, pool, min_tokens, tau, budget
):
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", budget)
    # sharp attention: some tokens matter and most do not
    q, k, v = case(length, length)
    q = q * 3
    exact = published(*(t.double() for t in (q, k, v)), window, pool, min_tokens, tau)
    for inputs in ((q, k, v), tuple(t.double() for t in (q, k, v))):
        scores = longctx.token_scores(inputs[0][:, -window:], inputs[1], pool=pool)
        plan = longctx.select_tokens(scores, drop_mass=tau, min_tokens=min_tokens, recent=window)
        kept = plan.counts[0, 0].item()
        assert window < kept < length  # a true choice
        assert torch.equal(plan.indices[..., :kept].long(), exact[0])
        assert (plan.indices[..., kept:] == -1).all()
        out = longctx.token_sparse_attention(*inputs, plan)
        torch.testing.assert_close(out.double(), exact[1], rtol=1e-4, atol=1e-5)


def test_by_hand():
    # two heads, four prefix tokens, one recent token; g = (0.4, 0.1, 0.2, 0.3)
    scores = torch.tensor([[[0.6, 0.1, 0.2, 0.1], [0.2, 0.1, 0.2, 0.5]]])
    expected = {
        0.0: [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
        0.05: [[0, 1, 2, 4], [0, 2, 3, 4]],  # one token holds 0.1; ties of head 0 go to token 1
        0.15: [[0, 2, 4], [0, 3, 4]],  # 0.1 is short of it, 0.3 is not; tie of head 1 to token 0
        0.35: [[0, 4], [3, 4]],
        0.95: [[4], [4]],
        1.0: [[4], [4]],
    }
    for drop_mass, sets in expected.items():
        plan = longctx.select_tokens(scores, drop_mass=drop_mass, min_tokens=0, recent=1)
        assert plan.counts.tolist() == [[len(sets[0])] * 2], drop_mass
        for h in (0, 1):
            row = plan.indices[0, h].tolist()
            assert row == sets[h] + [-1] * (5 - len(sets[h])), drop_mass
    floor = longctx.select_tokens(scores, drop_mass=0.95, min_tokens=3, recent=0)
    assert floor.indices[0].tolist() == [[0, 1, 2, -1], [0, 2, 3, -1]]
    short = longctx.select_tokens(scores, drop_mass=0.95, min_tokens=1024, recent=1)
    assert short.counts.tolist() == [[5, 5]]


@pytest.mark.parametrize("budget", ["256", "0.001"])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    ("window", "k_len", "pool"), [(1, 9, 3), (5, 5, 7), (8, 40, 7), (3, 50, 1)]
)
def test_scores_equal_oracle(monkeypatch, q_heads, kv_heads, window, k_len, pool, budget):
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", budget)
    q, k, _ = case(window, k_len, q_heads, kv_heads, batch=2)
    for scale in (None, 0.7):
        scores = longctx.token_scores(q, k, pool=pool, scale=scale)
        assert scores.dtype == torch.float32
        assert scores.shape == (2, q_heads, k_len - window)
        exact = oracle.token_scores(q.double(), k.double(), pool=pool, scale=scale)
        torch.testing.assert_close(scores, exact.float(), rtol=1e-4, atol=1e-6)


def test_padding_of_the_pool_counts_in_its_divisor():
    # no query prefers a key: shares are even, and pooling takes a third off both ends
    scores = longctx.token_scores(torch.zeros(1, 1, 1, 8), torch.randn(1, 7, 1, 8), pool=3)
    even = 1 / 7
    expected = torch.tensor([2 * even / 3, even, even, even, even, 2 * even / 3])
    torch.testing.assert_close(scores[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_inputs(dtype):
    q, k, _ = case(8, 60, dtype=dtype)
    scores = longctx.token_scores(q, k)
    exact = oracle.token_scores(q.double(), k.double())
    torch.testing.assert_close(scores, exact.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("drop_mass", [0.0, 0.01, 0.3, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("min_tokens", [0, 20, 97, 500])
def test_selection_equals_oracle(drop_mass, min_tokens):
    # a length for each batch entry: flat shares in one, a few large ones in the other
    scores = torch.rand(2, 3, 97)
    scores[1] = scores[1] ** 12
    options = {"drop_mass": drop_mass, "min_tokens": min_tokens, "recent": 8}
    plan = longctx.select_tokens(scores, **options)
    exact = oracle.select_tokens(scores, **options)
    assert torch.equal(plan.indices, exact.indices)
    assert torch.equal(plan.counts, exact.counts)
    if drop_mass in (0.3, 0.7) and min_tokens == 0:
        assert plan.counts[0, 0] > plan.counts[1, 0] > 8


def test_ties_go_to_the_lower_token():
    scores = torch.ones(1, 2, 50)
    plan = longctx.select_tokens(scores, drop_mass=0.5, min_tokens=0, recent=2)
    kept = plan.counts[0, 0].item()
    assert plan.indices[0, 0, :kept].tolist() == [*range(kept - 2), 50, 51]
    two = longctx.select_tokens(scores, drop_mass=1.0, min_tokens=4, recent=0)
    assert two.indices[0, 1].tolist() == [0, 1, 2, 3] + [-1] * 46


def test_scores_of_zero_leave_the_floor():
    options = {"drop_mass": 0.1, "min_tokens": 4, "recent": 1}
    plan = longctx.select_tokens(torch.zeros(1, 2, 9), **options)
    assert torch.equal(plan.indices, oracle.select_tokens(torch.zeros(1, 2, 9), **options).indices)
    assert plan.indices[0, 0].tolist() == [0, 1, 2, 3, 9, -1, -1, -1, -1, -1]


def token_sets(batch, sets, k_len, capacity):
    """Random ascending sets of ragged sizes, one of them empty."""
    counts = torch.randint(1, capacity + 1, (batch, sets), dtype=torch.int32)
    counts[0, 0] = 0
    indices = torch.full((batch, sets, capacity), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(sets):
            chosen = torch.randperm(k_len)[: counts[b, h]].sort().values
            indices[b, h, : counts[b, h]] = chosen.int()
    return indices, counts


AXES = {"shared": lambda q, kv: 1, "kv": lambda q, kv: kv, "query": lambda q, kv: q}


@pytest.mark.parametrize("budget", ["256", "0.001"])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("q_len", [30, 11, 1])
@pytest.mark.parametrize("scope", ["qkv", "kv"])
@pytest.mark.parametrize("head_axis", list(AXES))
def test_attention_equals_the_mask(
    monkeypatch, head_axis, scope, q_len, q_heads, kv_heads, budget
):
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", budget)
    q, k, v = case(q_len, 30, q_heads, kv_heads, batch=2)
    indices, counts = token_sets(2, AXES[head_axis](q_heads, kv_heads), 30, 17)
    plan = TokenSetPlan(indices, counts, head_axis, scope)
    out, lse = longctx.token_sparse_attention_with_lse(q, k, v, plan, scale=0.4)
    exact, exact_lse = oracle.token_sparse_attention(
        q.double(), k.double(), v.double(), plan, scale=0.4
    )
    torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(out.eq(0).all(-1).transpose(1, 2), lse.isneginf())
    assert torch.equal(longctx.token_sparse_attention(q, k, v, plan, scale=0.4), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_budget(dtype):
    q, k, v = case(40, 40, dtype=dtype)
    indices, counts = token_sets(1, 4, 40, 25)
    plan = TokenSetPlan(indices, counts, "query")
    exact, _ = oracle.token_sparse_attention(q.double(), k.double(), v.double(), plan)
    low, _ = oracle.token_sparse_attention(q, k, v, plan)
    assert_within_budget(longctx.token_sparse_attention(q, k, v, plan), exact, low)


def test_everything_kept_is_dense_attention():
    q, k, v = case(60, 60)
    scores = longctx.token_scores(q[:, -8:], k)
    plan = longctx.select_tokens(scores, drop_mass=0, min_tokens=0, recent=8)
    out, lse = longctx.token_sparse_attention_with_lse(q, k, v, plan)
    whole, whole_lse = dense(q, k, v, causal=True)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-4, atol=1e-5)


def test_chunks_of_queries_make_the_whole():
    q, k, v = case(50, 50, batch=2)
    plan = TokenSetPlan(*token_sets(2, 4, 50, 30), "query")
    whole = longctx.token_sparse_attention(q, k, v, plan)
    for first, last in pairwise((0, 7, 30, 49, 50)):
        behind = TokenSetPlan(
            plan.indices.where(plan.indices < last, -1),
            ((plan.indices >= 0) & (plan.indices < last)).sum(-1).int(),
            "query",
        )
        part = longctx.token_sparse_attention(q[:, first:last], k[:, :last], v[:, :last], behind)
        torch.testing.assert_close(part, whole[:, first:last], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q_len", [40, 13])
@pytest.mark.parametrize("head_axis", list(AXES))
def test_inner_attention_runs_on_compact_tensors(head_axis, q_len):
    q, k, v = case(q_len, 40, 6, 2, batch=2)
    indices, counts = token_sets(2, AXES[head_axis](6, 2), 40, 25)
    plan = TokenSetPlan(indices, counts, head_axis)
    seen = []

    def inner(q, k, v):
        seen.append((q.shape, k.shape))
        return longctx.flash_attention(q, k, v, causal=True)

    def inner_with_lse(q, k, v):
        return longctx.flash_attention_with_lse(q, k, v, causal=True)

    expected, expected_lse = longctx.token_sparse_attention_with_lse(q, k, v, plan)
    out = longctx.token_sparse_attention(q, k, v, plan, inner=inner)
    torch.testing.assert_close(out, expected)
    out, lse = longctx.token_sparse_attention_with_lse(q, k, v, plan, inner=inner_with_lse)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    ((q_shape, k_shape),) = seen
    assert k_shape[1] == counts.max()  # not the capacity
    assert (q_shape[2], k_shape[2]) == (6, 6 if head_axis == "query" else 2)


def test_inner_gets_only_the_queries_of_the_chunk():
    q, k, v = case(13, 40)
    even = TokenSetPlan(
        torch.arange(0, 40, 2).int().view(1, 1, -1), torch.tensor([[20]]).int(), "shared"
    )

    def inner(q, k, v):
        assert (q.shape[1], k.shape[1]) == (6, 20)
        return longctx.flash_attention(q, k, v, causal=True)

    out = longctx.token_sparse_attention(q, k, v, even, inner=inner)
    torch.testing.assert_close(out, longctx.token_sparse_attention(q, k, v, even))


def test_gradients_flow_through_inner():
    q, k, v = (t.double().requires_grad_() for t in case(12, 12, 2, 1, 4))
    plan = TokenSetPlan(*token_sets(1, 2, 12, 8), "query")

    def inner(q, k, v):
        return dense(q, k, v, causal=True)[0]

    def run(q, k, v):
        return longctx.token_sparse_attention(q, k, v, plan, inner=inner)

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("with_inner", [False, True])
def test_sets_without_a_query_call_nobody(with_inner):
    q, k, v = case(5, 30)
    early = TokenSetPlan(torch.arange(4).int().view(1, 1, 4), torch.tensor([[4]]).int(), "shared")
    empty = dataclasses.replace(early, counts=torch.tensor([[0]]).int())
    options = {"inner": lambda *_: pytest.fail("called")} if with_inner else {}
    for plan in (early, empty):
        assert longctx.token_sparse_attention(q, k, v, plan, **options).eq(0).all()


@pytest.mark.parametrize(("scope", "with_inner"), [("qkv", False), ("kv", False), ("qkv", True)])
def test_unselected_tokens_may_hold_nan(scope, with_inner):
    q, k, v = case(30, 30, batch=2)
    indices, counts = token_sets(2, 4, 29, 12)
    indices = indices.where(indices < 0, indices + 1)  # token 0, where a pad lands, is unselected
    plan = TokenSetPlan(indices, counts, "query", scope)
    options = {"inner": lambda *t: longctx.flash_attention(*t, causal=True)} if with_inner else {}
    clean = longctx.token_sparse_attention(q, k, v, plan, **options)
    member = torch.zeros(2, 31, dtype=torch.bool)
    member.scatter_(1, indices.flatten(1).where(indices.flatten(1) >= 0, 30).long(), True)
    unused = ~member[:, :30, None, None]
    assert unused[:, 0].all()
    poisoned = [t.masked_fill(unused, math.nan) for t in (k, v)]
    q = q if scope == "kv" else q.masked_fill(unused, math.nan)
    assert torch.equal(longctx.token_sparse_attention(q, *poisoned, plan, **options), clean)
