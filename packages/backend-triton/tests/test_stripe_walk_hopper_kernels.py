"""Stripes on Hopper: tables against the plan's mask, the kernel's source run by threads."""

from __future__ import annotations

import hopper_simulator as play
import pytest
import torch
from simulated_kernel import Simulated

from longctx import StripePlan
from longctx.reference import block_sparse as oracle
from longctx.testing.budget import assert_within_budget

pytest.importorskip("triton")

from longctx_triton import block_sparse
from longctx_triton.kernels import (
    flash_hopper,
    flash_hopper_softmax,
    key_walk,
    stripe_bits,
    stripe_walk_hopper,
)
from longctx_triton.launch import flash_hopper as flash_launch
from longctx_triton.launch import stripe_walk_hopper as launch
from longctx_triton.launch.device import Device

pytestmark = play.needs_interpreter

TILE = 128
SETS = {"shared": lambda q, kv: 1, "kv": lambda q, kv: kv, "query": lambda q, kv: q}


def bits(words):
    """Return ``[rows, 128]`` from words of which bit ``8 a + e`` is column ``8 a + 2 t + e``."""
    places = 8 * torch.arange(4).view(4, 1, 1) + torch.arange(2)
    return ((words[:, :, None, :, None] >> places) & 1).flatten(1).bool()


class StripeKernel(Simulated):
    """The kernel but for the layouts of its words."""

    def __init__(self):
        super().__init__(
            "stripe_walk_hopper_kernel",
            flash_hopper_softmax, flash_hopper, key_walk, stripe_bits, stripe_walk_hopper,
            _BLOCK=TILE, _BY_LANE=None, kept_words=self.words,
            keep=lambda scores, words: torch.where(bits(words), scores, -torch.inf),
        )  # fmt: skip

    def words(self, kept, bands, _layout):
        return self.functions["_band_words" if bands else "_column_words"](*kept, None)


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that the CPU is a Hopper GPU of three multiprocessors."""
    kernel = StripeKernel()
    monkeypatch.setattr(launch, "stripe_walk_hopper_kernel", kernel)
    monkeypatch.setattr(flash_launch, "TensorDescriptor", play.Description)
    monkeypatch.setattr(block_sparse, "device_of", lambda _: Device((9, 0), 3, 1 << 16))
    monkeypatch.delenv("LONGCTX_TRITON_FLASH", raising=False)
    return kernel


@pytest.fixture(params=[2, 3])
def stages(request, monkeypatch):
    """Run with so many stages."""
    tiles = launch.StripeWalkTiles(request.param, 240)
    monkeypatch.setattr(launch, "stripe_walk_tiles", lambda _: tiles)
    # launches are remembered with their tiles
    launch._plan.cache_clear()
    yield
    launch._plan.cache_clear()


def stripe_plan(axis, k_len, n_vertical, slash, heads, kv_heads, batch=2, seed=7):
    """Lists out of order, of different lengths, with holes (-1) and garbage behind the counts."""
    torch.manual_seed(seed)
    sets = SETS[axis](heads, kv_heads)

    def lists(rows):
        indices = torch.full((batch, sets, max(map(len, rows)) + 2), 10**6, dtype=torch.int32)
        counts = torch.zeros(batch, sets, dtype=torch.int32)
        for i, row in enumerate(rows):
            place = divmod(i, sets)
            indices[place][: len(row)] = torch.as_tensor(row).int()
            counts[place] = len(row)
        return indices, counts

    every = range(batch * sets)
    columns = [torch.randperm(k_len)[: n_vertical + i % 2].tolist() for i in every]
    columns[0].insert(min(1, n_vertical), -1)
    diagonals = [[d + i % 3 for d in reversed(slash)] for i in every]
    return StripePlan(*lists(columns), *lists(diagonals), axis)


def run(q, k, v, plan, scale=0.125):
    return block_sparse.stripe_sparse_forward(
        q, k, v, plan.vertical, plan.vertical_counts, plan.slash, plan.slash_counts, scale=scale
    )


CASES = [
    # axis, q_len, k_len, columns, distances, q heads, KV heads
    ("query", 131, 131, 9, [0, 1, 40, 127], 2, 1),
    ("kv", 75, 203, 40, [*range(70), 150], 4, 2),
    ("shared", 203, 203, 5, [], 2, 1),
    ("query", 130, 130, 0, [31, 32, 33, 64, 96], 2, 2),
    ("shared", 60, 41, 7, [0, 12], 2, 1),  # queries before the first key
    ("shared", 400, 41, 7, [0, 12], 1, 1),  # whole tiles of them
    ("kv", 1, 150, 20, [0, 3, 149], 2, 1),
    ("query", 600, 600, 300, [0, 1, 2, 130, 131, 500], 4, 2),  # columns in three steps
    ("kv", 520, 777, 130, [*range(5, 420), 600], 2, 2),  # whole bands, cut before key 0
    ("shared", 385, 900, 33, [*range(0, 898)], 2, 1),  # all distances
    ("query", 700, 700, 698, [0], 1, 1),
    ("shared", 64, 512, 0, [], 1, 1),  # nothing
    ("shared", 203, 300, 140, [0, 5, 64, 131], 6, 3),  # one set, columns of several KV heads
]


@pytest.mark.parametrize("case", CASES)
def test_stripes_equal_the_oracle(hopper, stages, case):
    axis, q_len, k_len, n_vertical, slash, q_heads, kv_heads = case
    plan = stripe_plan(axis, k_len, n_vertical, slash, q_heads, kv_heads)
    q = torch.randn(2, q_len, q_heads, 64).half()
    k, v = (torch.randn(2, k_len, kv_heads, 64).half() for _ in range(2))
    out, lse = run(q, k, v, plan)
    exact = oracle.block_sparse_attention(*(t.double() for t in (q, k, v)), plan, scale=0.125)
    rough = oracle.block_sparse_attention(q, k, v, plan, scale=0.125)
    assert_within_budget(out, exact[0], rough[0])
    torch.testing.assert_close(lse.double(), exact[1], atol=2e-5, rtol=2e-6)
    assert hopper.launches == 1


def test_other_head_sizes_and_scales_run_portably(hopper):
    plan = stripe_plan("kv", 130, 9, [0, 5], 2, 2)
    for dim, scale in ((64, -0.1), (32, 0.1)):
        q, k, v = (torch.randn(2, 130, 2, dim).half() for _ in range(3))
        out, _ = run(q, k, v, plan, scale)
        exact = oracle.block_sparse_attention(*(t.double() for t in (q, k, v)), plan, scale=scale)
        torch.testing.assert_close(out.double(), exact[0], atol=5e-3, rtol=5e-3)
    assert hopper.launches == 0


def tables_of(plan, k, v, device):
    """Run the kernel that makes bitmaps, lists and the columns' copies."""
    batch, k_len, kv_heads, dim = k.shape
    groups, sets = -(-k_len // TILE) + 1, plan.vertical.shape[1]
    n_vertical, n_slash = plan.vertical.shape[2], plan.slash.shape[2]
    copies, words = max(sets, kv_heads), 4 * (groups + 1)
    number, capacity = batch * copies, max(1, min(n_vertical, k_len))
    vertical, vertical_counts, slash, slash_counts, k, v = tensors = [
        t.to(device)
        for t in (plan.vertical, plan.vertical_counts, plan.slash, plan.slash_counts, k, v)
    ]
    tables = torch.full((number, 2, words, 2), 77, dtype=torch.int32, device=device)
    lists = torch.full((number, capacity + 6 * groups), -7, dtype=torch.int32, device=device)
    columns = torch.full(
        (2, batch, copies, capacity, dim), torch.nan, dtype=k.dtype, device=device
    )
    launch.stripe_tables_kernel[(number,)](
        tables, lists, columns, *tensors, *vertical.stride()[:2], vertical_counts.stride(0),
        *slash.stride()[:2], slash_counts.stride(0),
        *(stride // 8 for t in (k, v) for stride in t.stride()[:3]),
        copies, copies // sets, copies // kv_heads, k_len, groups, n_vertical, n_slash,
        capacity, lists.shape[1],
        D=dim, ENTRIES=launch.ENTRIES, CHUNK=launch.CHUNK, ROWS=launch.COPIED, num_warps=8,
    )  # fmt: skip
    return tables.cpu(), lists.cpu(), columns.cpu(), groups, capacity


@pytest.mark.parametrize("case", [*CASES, ("kv", 9, 9001, 1500, [*range(3000, 4500)], 2, 2)])
def test_tables_hold_the_plan(device, case):
    axis, _, k_len, n_vertical, slash, q_heads, kv_heads = case
    plan = stripe_plan(axis, k_len, n_vertical, slash, q_heads, kv_heads)
    batch, sets = plan.vertical.shape[:2]
    copies = max(sets, kv_heads)
    k, v = (torch.randn(batch, k_len, kv_heads, 64).half() for _ in range(2))
    tables, lists, copied, groups, capacity = tables_of(plan, k, v, device)
    # the last row of the mask holds all columns and all distances
    for number, (table, row) in enumerate(zip(tables, lists, strict=True)):
        i_b, i_c = divmod(number, copies)
        place = i_b, i_c // (copies // sets)
        kept = []
        for indices, counts in (
            (plan.vertical, plan.vertical_counts), (plan.slash, plan.slash_counts)
        ):  # fmt: skip
            listed = set(indices[place][: int(counts[place])].tolist())
            kept.append({n for n in listed if 0 <= n < k_len})
        columns, distances = kept
        words = table[..., 0].unsqueeze(-1) >> torch.arange(32) & 1
        found = [set(bitmap.flatten().nonzero().flatten().tolist()) for bitmap in words]
        assert found[0] == {n + TILE for n in columns}
        assert found[1] == {TILE * groups - d for d in distances}
        assert torch.equal(table[:, 1:, 0], table[:, :-1, 1])
        assert not table[:, -1, 1].any()

        places, rest = row[:capacity].tolist(), row[capacity:].view(6, groups).tolist()
        below, part, part_ranks, whole, whole_ranks, listed = rest
        assert places[: len(columns)] == sorted(columns)
        tile = min(-(-len(columns) // TILE) * TILE, capacity)  # zeros in the rest of the last one
        for tensor, copy in zip((k, v), copied, strict=True):
            rows = tensor[i_b, sorted(columns), i_c // (copies // kv_heads)]
            assert torch.equal(copy[i_b, i_c, : len(columns)], rows)
            assert not copy[i_b, i_c, len(columns) : tile].any()
        assert below == [sum(n < TILE * g for n in columns) for g in range(groups)]
        sizes = [
            len(distances & set(range(TILE * (m - 1) + 1, TILE * (m + 1)))) for m in range(groups)
        ]
        assert listed == [int(m == 0 or size > 0) for m, size in enumerate(sizes)]
        for bands, ranks, all_kept in ((part, part_ranks, False), (whole, whole_ranks, True)):
            wanted = [
                m for m, size in enumerate(sizes)
                if m > 0 and size > 0 and (size == 2 * TILE - 1) is all_kept
            ]  # fmt: skip
            assert bands[: len(wanted)] == wanted
            assert ranks == [sum(w <= m for w in wanted) for m in range(groups)]
