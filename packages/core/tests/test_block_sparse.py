"""Attention under block, stripe and window plans against the plans' own masks."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch

import longctx
from longctx import BlockPlan, StripePlan, WindowPlan
from longctx.reference import block_sparse as reference
from longctx.reference.flash import flash_attention, flash_mask, masked_attention
from longctx.torch_backend import flash

AXES = ("shared", "kv", "query")
LENGTHS = [(1, 1), (7, 7), (64, 64), (65, 65), (129, 129), (1, 130), (63, 257), (127, 255)]


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(q_len, k_len, *, batch=2, q_heads=4, kv_heads=2, dtype=torch.float64):
    return (
        random(batch, q_len, q_heads, 8, seed=1, dtype=dtype),
        random(batch, k_len, kv_heads, 8, seed=2, dtype=dtype),
        random(batch, k_len, kv_heads, 5, seed=3, dtype=dtype),
    )


def head_sets(axis, q_heads=4, kv_heads=2):
    return {"shared": 1, "kv": kv_heads, "query": q_heads}[axis]


def random_sets(shape, size, capacity, generator):
    """Return unique random ``indices [*shape, capacity]`` below ``size`` and random counts."""
    order = torch.rand(*shape, size, generator=generator).argsort(-1)[..., :capacity]
    counts = torch.randint(0, order.shape[-1] + 1, shape, generator=generator)
    return order.int(), counts.int()


def block_plan(q_len, k_len, axis, block_q=16, block_k=24, batch=2, seed=4):
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-k_len // block_k)
    shape = (batch, head_sets(axis), -(-q_len // block_q))
    indices, counts = random_sets(shape, blocks, blocks, generator)
    return BlockPlan(counts, indices, block_q, block_k, axis)


def stripe_plan(k_len, axis, columns=9, diagonals=7, batch=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, head_sets(axis))
    vertical = random_sets(shape, k_len, columns, generator)
    slash = random_sets(shape, k_len, diagonals, generator)
    return StripePlan(*vertical, *slash, axis)


def check(q, k, v, plan, tolerance=1e-11, **options):
    got = longctx.block_sparse_attention_with_lse(q, k, v, plan, **options)
    wanted = reference.block_sparse_attention(q, k, v, plan, **options)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return got


@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
@pytest.mark.parametrize("axis", AXES)
def test_plans_equal_their_masks(q_len, k_len, axis):
    q, k, v = inputs(q_len, k_len)
    for causal, (block_q, block_k) in itertools.product(
        (True, False), ((16, 24), (1, 7), (64, 1))
    ):
        plan = block_plan(q_len, k_len, axis, block_q, block_k)
        check(q, k, v, plan, causal=causal, scale=0.3)
    check(q, k, v, stripe_plan(k_len, axis))
    check(q, k, v, stripe_plan(k_len, axis, columns=0, diagonals=k_len))


@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": 5, "sink_tokens": 3},
        {"window": 63, "sink_tokens": 64, "last_queries": 2},
        {"window": 10**6, "sink_tokens": 10**6, "last_queries": 10**6},
        {"window": 4, "sink_tokens": 1, "head_windows": [0, 9, 70, 500]},
        {"window": 4, "last_queries": 1, "head_windows": [3, 3, 66, 66]},
    ],
)
def test_windows_equal_their_masks(q_len, k_len, options):
    options = dict(options)
    if "head_windows" in options:
        options["head_windows"] = torch.tensor(options["head_windows"], dtype=torch.int32)
    check(*inputs(q_len, k_len), WindowPlan(**options))


def test_hand_computed():
    # scores are 0, so each query averages the values it sees: blocks of 2, the query block 1
    # keeps key block 0 alone; the query block 0 keeps nothing
    q = k = torch.zeros(1, 4, 1, 2)
    v = torch.tensor([1.0, 3.0, 100.0, 1000.0]).view(1, 4, 1, 1)
    counts = torch.tensor([0, 1], dtype=torch.int32).view(1, 1, 2)
    indices = torch.tensor([0, 0], dtype=torch.int32).view(1, 1, 2, 1)
    plan = BlockPlan(counts, indices, 2, 2, "shared")
    out, lse = longctx.block_sparse_attention_with_lse(q, k, v, plan)
    assert out.flatten().tolist() == [0.0, 0.0, 2.0, 2.0]
    assert lse.flatten().tolist() == pytest.approx([-math.inf, -math.inf, *[math.log(2)] * 2])
    # the sink 0 and the query itself
    out = longctx.block_sparse_attention(q, k, v, WindowPlan(window=0, sink_tokens=1))
    assert out.flatten().tolist() == [1.0, 2.0, 50.5, 500.5]
    # column 1 and the diagonal 2: rows see {}, {1}, {0, 1}, {1}; pair (3, 1) is on both
    one = torch.ones(1, 1, dtype=torch.int32)
    plan = StripePlan(one.unsqueeze(2), one, 2 * one.unsqueeze(2), one, "shared")
    out, lse = longctx.block_sparse_attention_with_lse(q, k, v, plan)
    assert out.flatten().tolist() == [0.0, 3.0, 2.0, 3.0]
    assert lse.flatten().tolist() == pytest.approx([-math.inf, 0.0, math.log(2), 0.0])


def test_full_plans_are_dense_attention():
    q, k, v = inputs(65, 130, batch=1)
    wanted = flash_attention(q, k, v, causal=True)
    every = torch.arange(130, dtype=torch.int32).view(1, 1, 130)
    count = torch.full((1, 1), 130, dtype=torch.int32)
    blocks = torch.arange(5, dtype=torch.int32).view(1, 1, 1, 5).expand(1, 1, 3, 5)
    for plan in (
        WindowPlan(window=129),
        WindowPlan(window=0, last_queries=65),
        StripePlan(every, count, every, count, "shared"),
        BlockPlan(torch.full((1, 1, 3), 5, dtype=torch.int32), blocks, 30, 26, "shared"),
    ):
        got = longctx.block_sparse_attention_with_lse(q, k, v, plan)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_groups_and_batches(kv_heads, batch):
    q, k, v = inputs(40, 70, batch=batch, kv_heads=kv_heads)
    generator = torch.Generator().manual_seed(0)
    for axis, sets in (("shared", 1), ("kv", kv_heads), ("query", 4)):
        indices, counts = random_sets((batch, sets, 5), 7, 7, generator)
        check(q, k, v, BlockPlan(counts, indices, 8, 10, axis))
        vertical = random_sets((batch, sets), 70, 6, generator)
        check(q, k, v, StripePlan(*vertical, *random_sets((batch, sets), 70, 6, generator), axis))


def chunk_of(plan, start, stop):
    """Return the plan of queries ``[start, stop)`` over the keys before ``stop``."""

    def below(indices, size):
        return indices.where(indices < size, -1)

    if isinstance(plan, BlockPlan):
        rows = slice(start // plan.block_q, stop // plan.block_q)
        indices = below(plan.indices[..., rows, :], -(-stop // plan.block_k))
        return replace(plan, counts=plan.counts[..., rows], indices=indices)
    if isinstance(plan, StripePlan):
        return replace(plan, vertical=below(plan.vertical, stop), slash=below(plan.slash, stop))
    return plan


@pytest.mark.parametrize("kind", ["block", "stripe", "window"])
def test_prefill_in_chunks_is_one_shot(kind):
    q, k, v = inputs(120, 120)
    plan = {
        "block": block_plan(120, 120, "kv", 20, 24),
        "stripe": stripe_plan(120, "kv"),
        "window": WindowPlan(window=17, sink_tokens=3),
    }[kind]
    whole = longctx.block_sparse_attention_with_lse(q, k, v, plan)
    outs, lses = [], []
    for start, stop in ((0, 40), (40, 60), (60, 120)):
        out, lse = longctx.block_sparse_attention_with_lse(
            q[:, start:stop], k[:, :stop], v[:, :stop], chunk_of(plan, start, stop)
        )
        outs.append(out)
        lses.append(lse)
    torch.testing.assert_close(torch.cat(outs, 1), whole.out)
    torch.testing.assert_close(torch.cat(lses, 2), whole.lse)


def test_more_queries_than_keys_leave_empty_rows():
    q, k, v = inputs(9, 4)
    for plan in (
        block_plan(9, 4, "kv", 4, 4),
        stripe_plan(4, "kv", columns=4, diagonals=4),
        WindowPlan(window=2, sink_tokens=1),
        WindowPlan(window=1, last_queries=7),
    ):
        out, lse = check(q, k, v, plan)
        assert torch.equal(out[:, :5], torch.zeros(2, 5, 4, 5))
        assert (lse[..., :5] == -math.inf).all()


def test_no_keys_and_no_queries():
    for q_len, k_len in ((3, 0), (0, 3), (0, 0)):
        q, k, v = inputs(q_len, k_len)
        counts = torch.zeros(2, 1, -(-q_len // 2), dtype=torch.int32)
        none = torch.zeros(2, 1, 0, dtype=torch.int32)
        zero = torch.zeros(2, 1, dtype=torch.int32)
        for plan in (
            BlockPlan(counts, counts.unsqueeze(3), 2, 2, "shared"),
            StripePlan(none, zero, none, zero, "shared"),
            WindowPlan(window=1, last_queries=1),
        ):
            out, lse = longctx.block_sparse_attention_with_lse(q, k, v, plan)
            assert out.shape == (2, q_len, 4, 5)
            assert not out.any()
            assert (lse == -math.inf).all()


def test_slots_of_minus_one_are_skipped():
    q, k, v = inputs(32, 32, batch=1)
    indices = torch.tensor([[-1, 0], [1, -1]], dtype=torch.int32).view(1, 1, 2, 2)
    plan = BlockPlan(torch.full((1, 1, 2), 2, dtype=torch.int32), indices, 16, 16, "shared")
    check(q, k, v, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["block", "stripe", "window"])
def test_precision(dtype, kind):
    q, k, v = inputs(200, 200, dtype=dtype)
    plan = {
        "block": block_plan(200, 200, "kv"),
        "stripe": stripe_plan(200, "kv"),
        "window": WindowPlan(window=30, sink_tokens=4, last_queries=3),
    }[kind]
    out, lse = longctx.block_sparse_attention_with_lse(q, k, v, plan)
    exact, exact_lse = reference.block_sparse_attention(q.double(), k.double(), v.double(), plan)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # what rounding the exact result costs, and as much again
    rounded = (exact.to(dtype).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * rounded + 1e-6
    # PyTorch's fused CPU kernel, which a window runs on, knows a half-precision lse to about 6e-5
    fused = kind == "window" and dtype != torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-4 if fused else 1e-5)


def test_views_of_a_fused_projection():
    fused = torch.randn(2, 100, 6, 16, dtype=torch.float64)
    q, k, v = fused[:, :, :4, :8], fused[:, :, 4:, :8], fused[:, :, 4:, 8:]
    for plan in (block_plan(100, 100, "query"), stripe_plan(100, "kv"), WindowPlan(window=9)):
        out, lse = check(q, k, v, plan)
        assert out.is_contiguous()
        assert lse.is_contiguous()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_keys_that_nothing_keeps_may_hold_anything(poison):
    q, k, v = inputs(96, 96)
    windows = WindowPlan(window=3, sink_tokens=2)
    stripes = stripe_plan(96, "query", columns=5, diagonals=2)
    for plan, rows in ((block_plan(96, 96, "query"), 96), (stripes, 96), (windows, 16)):
        part = q[:, 96 - rows :]
        used = plan.to_mask(rows, 96).any(2)
        # [B, k_len, Hkv]: a key is used if any head of its group keeps it
        used = used.expand(2, 4, 96).unflatten(1, (2, 2)).any(2).transpose(1, 2)
        assert not used.all()
        clean = longctx.block_sparse_attention_with_lse(part, k, v, plan)
        dirty = (t.masked_fill(~used.unsqueeze(3), poison) for t in (k, v))
        got = longctx.block_sparse_attention_with_lse(part, *dirty, plan)
        for a, b in zip(got, clean, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["block", "stripe", "window"])
def test_pieces_of_a_small_budget_merge_exactly(kind, monkeypatch):
    q, k, v = inputs(130, 260)
    plan = {
        "block": block_plan(130, 260, "kv", 64, 8),
        "stripe": stripe_plan(260, "kv", columns=60, diagonals=60),
        "window": WindowPlan(window=100, sink_tokens=30),
    }[kind]
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", "0.01")
    check(q, k, v, plan)


def largest_allocation(function):
    """Return the bytes of the largest tensor that one operation allocated."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("kind", ["block", "stripe"])
def test_memory_is_bounded(kind, monkeypatch):
    length = 2048
    q, k, v = (torch.randn(1, length, 1, 4) for _ in range(3))
    every = torch.arange(16, dtype=torch.int32).expand(1, 1, 4, 16)
    columns = torch.arange(0, length, 4, dtype=torch.int32).view(1, 1, -1)
    count = torch.full((1, 1), columns.shape[2], dtype=torch.int32)
    plan = {
        "block": BlockPlan(torch.full((1, 1, 4), 16, dtype=torch.int32), every, 512, 128, "kv"),
        "stripe": StripePlan(columns, count, columns, count, "kv"),
    }[kind]
    budget = 2**20
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", "1")
    used = largest_allocation(lambda: longctx.block_sparse_attention(q, k, v, plan))
    # positions of gathered keys are int64, a mask is a byte a pair; all pairs would be 16 MiB
    assert used <= 2 * budget


def test_a_window_holds_one_block_of_pairs_whatever_the_length():
    plan = WindowPlan(window=1000, sink_tokens=100, last_queries=100)
    used = []
    for length in (2048, 8192):
        q, k, v = (torch.randn(1, length, 1, 4) for _ in range(3))
        call = functools.partial(longctx.block_sparse_attention, q, k, v, plan)
        used.append(largest_allocation(call))
    # all pairs of the longer one would be 256 MiB
    assert used[1] <= 1.1 * used[0] < 8 * 2**20


def test_a_window_takes_work_linear_in_the_length(monkeypatch):
    pairs = []
    attend = flash.attend

    def counted(q, k, v, **options):
        pairs.append(q.shape[1] * k.shape[1])
        return attend(q, k, v, **options)

    monkeypatch.setattr(flash, "attend", counted)
    work = []
    for length in (1024, 2048):
        pairs.clear()
        q = torch.randn(1, length, 1, 4)
        longctx.block_sparse_attention(q, q, q, WindowPlan(window=64, sink_tokens=4))
        work.append(sum(pairs))
    assert work[1] <= 2.2 * work[0]
    # a block of 64 queries reaches 64 keys before its first one; the sinks come on top
    assert work[0] <= 1024 * (2 * 64 + 4)


def test_the_oracle_is_masked_softmax():
    q, k, v = inputs(5, 5, q_heads=1, kv_heads=1, batch=1)
    out, _ = masked_attention(q, k, v, flash_mask(5, 5, causal=True), scale=1.0)
    for i in range(5):
        weights = torch.softmax(k[0, : i + 1, 0] @ q[0, i, 0], 0)
        torch.testing.assert_close(out[0, i, 0], weights @ v[0, : i + 1, 0])
