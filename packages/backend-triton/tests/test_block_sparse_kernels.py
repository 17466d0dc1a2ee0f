"""Attention under plans against the fp64 oracle: odd sizes, every head axis, strides, poison."""

from __future__ import annotations

import pytest
import torch

from longctx import BlockPlan, StripePlan, WindowPlan
from longctx.reference import block_sparse as oracle
from longctx.testing.budget import assert_within_budget
from longctx_triton import block_sparse

SETS = {"shared": lambda q, kv: 1, "kv": lambda q, kv: kv, "query": lambda q, kv: q}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


def inputs(device, q_len, k_len, heads=4, kv_heads=2, dim=64, value_dim=None, dtype=torch.float16):
    """Head-major storage, seen as [batch, seq, heads, dim]: strides that are not contiguous."""
    value_dim = value_dim or dim
    return tuple(
        torch.randn(2, h, n, d, device=device).to(dtype).transpose(1, 2)
        for h, n, d in ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim))
    )


def run(q, k, v, plan, *, causal=True, scale=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if isinstance(plan, BlockPlan):
        return block_sparse.block_sparse_forward(
            q, k, v, plan.counts, plan.indices, block_q=plan.block_q, block_k=plan.block_k,
            causal=causal, scale=scale,
        )  # fmt: skip
    if isinstance(plan, StripePlan):
        return block_sparse.stripe_sparse_forward(
            q, k, v, plan.vertical, plan.vertical_counts, plan.slash, plan.slash_counts,
            scale=scale,
        )  # fmt: skip
    return block_sparse.window_sparse_forward(
        q, k, v, plan.head_windows, window=plan.window, sink_tokens=plan.sink_tokens,
        last_queries=plan.last_queries, scale=scale,
    )  # fmt: skip


def check(q, k, v, plan, *, causal=True, scale=None):
    out, lse = run(q, k, v, plan, causal=causal, scale=scale)
    options = {"scale": scale, "causal": causal}
    exact = oracle.block_sparse_attention(*(t.double() for t in (q, k, v)), plan, **options)
    low = oracle.block_sparse_attention(q, k, v, plan, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert_within_budget(out, exact[0], low[0], name="out")
    assert_within_budget(lse, exact[1], exact[1].float(), name="lse")
    return out, lse


def block_plan(device, axis, q_len, k_len, block_q, block_k, heads=4, kv_heads=2, keep=0.5):
    """A random plan with lists out of order, holes (-1), and garbage behind the counts."""
    sets, rows, blocks = SETS[axis](heads, kv_heads), -(-q_len // block_q), -(-k_len // block_k)
    order = torch.rand(2, sets, rows, blocks).argsort(-1).int()
    counts = (torch.rand(2, sets, rows) * (blocks + 1) * 2 * keep).int().clamp(max=blocks)
    counts[0, 0, 0] = 0
    order[torch.rand(order.shape) < 0.1] = -1
    order[torch.arange(blocks) >= counts.unsqueeze(-1)] = 10**6
    return BlockPlan(counts.to(device), order.to(device), block_q, block_k, axis)


@pytest.mark.parametrize(
    ("axis", "block_q", "block_k", "q_len", "k_len", "causal"),
    [
        ("query", 64, 64, 133, 201, True),
        ("kv", 128, 128, 150, 150, True),
        ("shared", 64, 128, 97, 261, False),
        ("query", 48, 16, 77, 93, True),
        ("kv", 16, 80, 65, 33, True),
        ("shared", 100, 7, 101, 60, False),
        ("shared", 64, 64, 100, 130, True),  # the diagonal begins a key before a tile ends
    ],
)
def test_blocks_equal_oracle(device, axis, block_q, block_k, q_len, k_len, causal):
    q, k, v = inputs(device, q_len, k_len)
    plan = block_plan(device, axis, q_len, k_len, block_q, block_k)
    out, lse = check(q, k, v, plan, causal=causal)
    assert lse[0, 0, : min(block_q, q_len)].isneginf().all()
    assert not out[0, : min(block_q, q_len), 0].any()


@pytest.mark.parametrize(("dim", "value_dim"), [(128, 128), (256, 256), (96, 64)])
def test_blocks_of_other_head_sizes(device, dim, value_dim):
    q, k, v = inputs(device, 70, 70, heads=2, kv_heads=1, dim=dim, value_dim=value_dim)
    plan = block_plan(device, "query", 70, 70, 32, 32, heads=2, kv_heads=1, keep=1.0)
    check(q, k, v, plan)


def test_blocks_in_bf16(device):
    q, k, v = inputs(device, 70, 90, dtype=torch.bfloat16)
    plan = block_plan(device, "kv", 70, 90, 32, 32)
    out, _ = run(q, k, v, plan)
    exact = oracle.block_sparse_attention(*(t.double() for t in (q, k, v)), plan)[0]
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def stripe_plan(device, axis, k_len, n_vertical, slash, heads=4, kv_heads=2):
    sets = SETS[axis](heads, kv_heads)

    def lists(rows):
        width = max(len(row) for row in rows) + 2
        indices = torch.full((2, sets, width), 10**6, dtype=torch.int32)
        counts = torch.zeros(2, sets, dtype=torch.int32)
        for i, row in enumerate(rows):
            b, h = divmod(i, sets)
            indices[b, h, : len(row)] = torch.as_tensor(row).int()
            counts[b, h] = len(row)
        return indices.to(device), counts.to(device)

    columns = [torch.randperm(k_len)[: n_vertical + i % 2].tolist() for i in range(2 * sets)]
    columns[0].insert(1, -1)
    diagonals = [[d + i % 3 for d in slash] for i in range(2 * sets)]
    return StripePlan(*lists(columns), *lists(diagonals), axis)


@pytest.mark.parametrize(
    ("axis", "q_len", "k_len", "n_vertical", "slash"),
    [
        ("query", 131, 131, 9, [0, 1, 40, 127]),
        ("kv", 75, 203, 40, [*range(70), 150]),  # whole bands, too
        ("shared", 203, 203, 5, []),
        ("query", 130, 130, 0, [31, 32, 33, 64, 96]),
        ("shared", 60, 41, 7, [0, 12]),  # queries before the first key
        ("kv", 1, 150, 20, [0, 3, 149]),
    ],
)
def test_stripes_equal_oracle(device, axis, q_len, k_len, n_vertical, slash):
    q, k, v = inputs(device, q_len, k_len)
    slash = [d for d in slash if d < k_len - 2]
    check(q, k, v, stripe_plan(device, axis, k_len, n_vertical, slash))


def test_stripe_columns_that_nobody_chose_may_hold_anything(device, monkeypatch):
    # Hopper's kernel reads whole blocks: of a tile's own positions, and of each band it walks
    monkeypatch.setenv("LONGCTX_TRITON_FLASH", "portable")
    q, k, v = inputs(device, 40, 100)
    plan = stripe_plan(device, "shared", 100, 6, [])
    chosen = plan.vertical[..., :7].flatten().long()
    poisoned = torch.ones(100, dtype=torch.bool, device=device)
    poisoned[chosen[(chosen >= 0) & (chosen < 100)]] = False
    clean = run(q, k, v, plan)
    k[:, poisoned] = torch.nan
    v[:, poisoned] = torch.nan
    for ours, expected in zip(run(q, k, v, plan), clean, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("q_len", "k_len", "window", "sinks", "last"),
    [
        (150, 150, 40, 4, 0),
        (150, 150, 3, 0, 0),
        (90, 211, 64, 37, 10),
        (90, 211, 0, 70, 90),
        (41, 30, 5, 2, 3),  # queries before the first key
        (100, 100, 10**9, 10**9, 0),
        (1, 130, 7, 3, 0),
        (64, 260, 126, 31, 0),  # the diagonal and the sinks end a key before a tile does
        (70, 300, 140, 150, 0),
    ],
)
def test_windows_equal_oracle(device, q_len, k_len, window, sinks, last):
    q, k, v = inputs(device, q_len, k_len)
    check(q, k, v, WindowPlan(window, sinks, last))
    heads = torch.tensor([0, 5, window % 1000, 10**6], dtype=torch.int32, device=device)
    check(q, k, v, WindowPlan(window, sinks, last, heads))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_finite_scale(device, scale):
    q, k, v = inputs(device, 50, 80)
    check(q, k, v, WindowPlan(20, 3), scale=scale)


@pytest.mark.parametrize("k_len", [0, 3])
def test_nothing_to_attend_gives_zero(device, k_len):
    q, k, v = inputs(device, 20, k_len)
    none = torch.zeros(2, 1, 1, dtype=torch.int32, device=device)
    for plan in (
        WindowPlan(4, 2),
        BlockPlan(none, none.unsqueeze(3), 20, 16, "shared"),
        StripePlan(none, none[..., 0], none, none[..., 0], "shared"),
    ):
        out, lse = run(q, k, v, plan)
        rows = slice(0, 20 - k_len if isinstance(plan, WindowPlan) else 20)
        assert not out[:, rows].any()
        assert lse[..., rows].isneginf().all()
    assert run(q[:, :0], k, v, WindowPlan(4, 2))[0].shape == (2, 0, 4, 64)


def test_same_bits_every_run(device):
    q, k, v = inputs(device, 100, 100)
    for plan in (
        block_plan(device, "query", 100, 100, 32, 32),
        stripe_plan(device, "kv", 100, 9, [0, 1, 50]),
        WindowPlan(30, 4),
    ):
        first, second = run(q, k, v, plan), run(q, k, v, plan)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
