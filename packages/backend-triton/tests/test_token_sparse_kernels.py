"""Token Sparse Attention against the fp64 oracle: scores, exact selection, attention in a set."""

from __future__ import annotations

import pytest
import torch

from longctx import TokenSetPlan
from longctx.reference import token_sparse as oracle
from longctx.testing.budget import assert_within_budget
from longctx_triton import token_sparse
from longctx_triton.kernels import select_rows

SETS = {"shared": 1, "kv": 2, "query": 4}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


def tensor(device, n, heads, dim=64):
    return torch.randn(2, heads, n, dim, device=device).half().transpose(1, 2)


@pytest.mark.parametrize(
    ("window", "k_len", "pool", "heads", "scale"),
    [
        (32, 230, 7, (4, 2), 0.125),
        (1, 90, 1, (4, 4), 0.5),
        (50, 51, 3, (3, 1), 0.2),
        (70, 300, 5, (8, 2), -0.1),
        (20, 20, 3, (4, 2), 0.1),
    ],
)
def test_scores_equal_oracle(device, window, k_len, pool, heads, scale):
    q, k = tensor(device, window, heads[0]), tensor(device, k_len, heads[1])
    scores = token_sparse.token_scores_forward(q, k, pool=pool, scale=scale)
    exact = oracle.token_scores(q.double(), k.double(), pool=pool, scale=scale)
    assert scores.dtype == torch.float32
    assert scores.shape == (2, heads[0], k_len - window)
    if scores.numel():
        low = oracle.token_scores(q, k, pool=pool, scale=scale)
        assert_within_budget(scores, exact, low, name="scores")


def plans_agree(scores, **options):
    indices, counts = token_sparse.select_tokens_forward(scores, **options)
    exact = oracle.select_tokens(scores, **options)
    assert indices.dtype == counts.dtype == torch.int32
    assert torch.equal(counts, exact.counts)
    assert torch.equal(indices, exact.indices)
    return counts


@pytest.mark.parametrize("drop_mass", [0.0, 1e-9, 0.005, 0.2, 0.77, 0.999])
@pytest.mark.parametrize(("length", "least", "recent"), [(301, 16, 5), (64, 100, 0), (1, 0, 3)])
def test_selection_equals_oracle(device, drop_mass, length, least, recent):
    scores = torch.rand(2, 3, length, device=device).pow(6)
    scores[1] *= 1e-20
    plans_agree(scores, drop_mass=drop_mass, min_tokens=least, recent=recent)


PROFILES = {
    "few values": lambda n: torch.randint(0, 4, (2, 3, n)) / 4,
    "all equal": lambda n: torch.full((2, 3, n), 0.25),
    "all zero": lambda n: torch.zeros(2, 3, n),
    "one holds all": lambda n: torch.nn.functional.one_hot(torch.tensor(n // 2), n).expand(
        2, 3, n
    ),
    "denormal": lambda n: torch.randint(0, 9, (2, 3, n)) * 2.0**-149,
    "many binades": lambda n: 2.0 ** torch.randint(-60, 20, (2, 3, n)),
}


@pytest.mark.parametrize("drop_mass", [0.1, 0.5])
@pytest.mark.parametrize("profile", PROFILES)
def test_selection_of_difficult_scores(device, monkeypatch, profile, drop_mass):
    monkeypatch.setattr(select_rows, "CHUNK", 32)  # several chunks and blocks a row
    monkeypatch.setattr(select_rows, "ROW_BLOCK", 64)
    scores = PROFILES[profile](151).float().contiguous().to(device)
    plans_agree(scores, drop_mass=drop_mass, min_tokens=3, recent=2)


def test_selection_differs_by_batch_entry_and_takes_strides(device):
    scores = torch.rand(3, 2, 200, device=device).transpose(0, 1)
    scores[0, :, 50:] *= 1e-6
    counts = plans_agree(scores, drop_mass=0.3, min_tokens=4, recent=6)
    assert counts[0, 0] != counts[1, 0]


def plan_of(device, axis, k_len, keep):
    sets = SETS[axis]
    width = k_len + 3
    indices = torch.full((2, sets, width), -1, dtype=torch.int32)
    counts = torch.zeros(2, sets, dtype=torch.int32)
    for b in range(2):
        for h in range(sets):
            chosen = (torch.rand(k_len) < keep).nonzero().squeeze(1).int()
            indices[b, h, : len(chosen)] = chosen
            counts[b, h] = len(chosen)
    counts[1, -1] = 0
    return TokenSetPlan(indices.to(device), counts.to(device), axis)


@pytest.mark.parametrize(
    ("axis", "q_len", "k_len", "keep"),
    [
        ("query", 200, 200, 0.6),
        ("kv", 75, 190, 0.5),
        ("shared", 150, 150, 1.0),
        ("query", 1, 80, 0.5),
        ("kv", 60, 60, 0.0),
    ],
)
def test_attention_equals_oracle(device, axis, q_len, k_len, keep):
    q, k, v = tensor(device, q_len, 4), tensor(device, k_len, 2), tensor(device, k_len, 2)
    plan = plan_of(device, axis, k_len, keep)
    out, lse = token_sparse.token_sparse_forward(q, k, v, plan.indices, plan.counts, scale=0.125)
    wide = (t.double() for t in (q, k, v))
    exact = oracle.token_sparse_attention(*wide, plan, scale=0.125)
    low = oracle.token_sparse_attention(q, k, v, plan, scale=0.125)
    assert_within_budget(out, exact[0], low[0], name="out")
    assert_within_budget(lse, exact[1], exact[1].float(), name="lse")
    assert not out[exact[1].isneginf().transpose(1, 2)].any()


@pytest.mark.parametrize(("dim", "value_dim"), [(128, 128), (256, 256), (96, 64)])
def test_attention_of_other_head_sizes(device, dim, value_dim):
    q, k, v = (
        tensor(device, 70, 4, dim),
        tensor(device, 70, 2, dim),
        tensor(device, 70, 2, value_dim),
    )
    plan = plan_of(device, "kv", 70, 0.7)
    out, _ = token_sparse.token_sparse_forward(q, k, v, plan.indices, plan.counts, scale=dim**-0.5)
    exact = oracle.token_sparse_attention(*(t.double() for t in (q, k, v)), plan)[0]
    low = oracle.token_sparse_attention(q, k, v, plan)[0]
    assert_within_budget(out, exact, low, name="out")


def test_tokens_outside_the_set_may_hold_anything(device):
    q, k, v = (tensor(device, 90, heads) for heads in (4, 2, 2))
    plan = plan_of(device, "shared", 90, 0.4)
    plan.counts[1] = plan.counts[0]
    plan.indices[1] = plan.indices[0]
    clean = token_sparse.token_sparse_forward(q, k, v, plan.indices, plan.counts, scale=0.1)
    outside = torch.ones(90, dtype=torch.bool, device=device)
    outside[plan.indices[0, 0, : plan.counts[0, 0]].long()] = False
    for t in (q, k, v):
        t[:, outside] = torch.nan
    again = token_sparse.token_sparse_forward(q, k, v, plan.indices, plan.counts, scale=0.1)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
