"""The Gluon kernel of key walks, its own source run by threads: see hopper_simulator."""

from __future__ import annotations

import hopper_simulator as play
import pytest
import torch
from simulated_kernel import Simulated

from longctx import BlockPlan, WindowPlan
from longctx.reference import block_sparse as blocks_oracle
from longctx.reference import flash as flash_oracle
from longctx.reference import star as star_oracle
from longctx.testing.budget import assert_within_budget

pytest.importorskip("triton")

from longctx_triton import block_sparse, flash, star
from longctx_triton.kernels import flash_hopper, flash_hopper_softmax, key_walk, key_walk_hopper
from longctx_triton.kernels.walk_list import walk_list_kernel
from longctx_triton.launch import flash_hopper as flash_launch
from longctx_triton.launch import key_walk_hopper as launch
from longctx_triton.launch.device import Device

pytestmark = play.needs_interpreter


class ListKernel:
    """What `walk_list_kernel` does, in Python."""

    def __getitem__(self, _grid):
        return self.start

    @staticmethod
    def start(
        counts, indices, starts, walks, _b, _h, _n, _ib, _ih, _in, _ic,
        sets, tiles, q_len, k_len, capacity, room, block_q, rows, each,
        *, BLOCK_K, ENTRIES, BINS, CAUSAL, num_warps,
    ):  # fmt: skip
        starts, walks = starts.view(-1, room), walks.view(-1, 2)
        for number in range(len(starts)):
            i_t, i_x, i_b = number % tiles, number // tiles % sets, number // tiles // sets
            block = i_t * rows // block_q
            count = min(int(counts[i_b, i_x, block]), capacity)
            listed = indices[i_b, i_x, block, :count].tolist()
            steps = {n * each + e for n in listed for e in range(each) if n >= 0}
            last = min(i_t * rows + rows, q_len) - 1 + k_len - q_len if CAUSAL else k_len - 1
            seen = min(last, i_t * rows + k_len - q_len) if CAUSAL else k_len - 1
            kept = sorted((n for n in steps if n * BLOCK_K <= min(last, k_len - 1)), reverse=True)
            masked = sum((n + 1) * BLOCK_K > seen + 1 for n in kept)
            kept = kept or [-(-k_len // BLOCK_K)]
            starts[number, : len(kept)] = torch.tensor(kept, dtype=torch.int32) * BLOCK_K
            walks[number] = torch.tensor([max(masked, 1), len(kept)], dtype=torch.int32)


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that the CPU is a Hopper GPU of three multiprocessors."""
    modules = (flash_hopper_softmax, flash_hopper, key_walk, key_walk_hopper)
    kernel = Simulated("key_walk_hopper_kernel", *modules)
    device = Device((9, 0), 3, 1 << 16)
    monkeypatch.setattr(launch, "key_walk_hopper_kernel", kernel)
    monkeypatch.setattr(launch, "walk_list_kernel", ListKernel())
    monkeypatch.setattr(flash_launch, "TensorDescriptor", play.Description)
    for family in (block_sparse, flash, star):
        monkeypatch.setattr(family, "device_of", lambda _: device)
    monkeypatch.delenv("LONGCTX_TRITON_FLASH", raising=False)
    return kernel


@pytest.fixture(params=[2, 3])
def stages(request, monkeypatch):
    """Run with so many stages."""

    def tiles(_head_dim, most_keys):
        return launch.WalkTiles(most_keys, request.param, 240)

    monkeypatch.setattr(launch, "walk_tiles", tiles)
    # launches are remembered with their tiles
    plans = (launch._range_plan, launch._list_plan)
    [plan.cache_clear() for plan in plans]
    yield
    [plan.cache_clear() for plan in plans]


def inputs(q_len, k_len, q_heads, kv_heads, batch=1, dim=64):
    torch.manual_seed(q_len + k_len)
    q = torch.randn(batch, q_len, q_heads, dim).half()
    k, v = (torch.randn(batch, k_len, kv_heads, dim).half() for _ in range(2))
    return q, k, v


def agree(actual, oracle, q, k, v, *args, **options):
    exact = oracle(q.double(), k.double(), v.double(), *args, **options)
    rough = oracle(q, k, v, *args, **options)
    assert_within_budget(actual[0], exact[0], rough[0])
    torch.testing.assert_close(actual[1].double(), exact[1], atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize(
    ("q_len", "k_len", "window", "sinks", "last"),
    [
        (150, 150, 3, 0, 0),
        (90, 211, 64, 37, 10),
        (90, 211, 0, 70, 90),
        (400, 30, 5, 2, 3),  # tiles before the first key
        (100, 100, 10**9, 10**9, 0),
        (1, 130, 7, 3, 0),
        (70, 300, 140, 150, 0),
        (700, 700, 256, 0, 0),
        (700, 733, 257, 100, 50),
        (513, 513, 30, 200, 0),  # the first keys end in a tile's diagonal
        (600, 700, 300, 250, 130),
    ],
)
def test_windows(hopper, stages, q_len, k_len, window, sinks, last):
    q, k, v = inputs(q_len, k_len, 2, 1)
    for heads in (None, torch.tensor([5, window % 1000], dtype=torch.int32)):
        plan = WindowPlan(window, sinks, last, heads)
        actual = block_sparse.window_sparse_forward(
            q, k, v, heads, window=window, sink_tokens=sinks, last_queries=last, scale=0.125
        )
        agree(actual, blocks_oracle.block_sparse_attention, q, k, v, plan, scale=0.125)
    assert hopper.launches == 2


@pytest.mark.parametrize(
    ("q_len", "k_len"), [(200, 333), (200, 150)], ids=["", "rows without keys"]
)
@pytest.mark.parametrize("sinks", [False, True])
def test_flash_with_a_window(hopper, stages, sinks, q_len, k_len):
    q, k, v = inputs(q_len, k_len, 4, 2, batch=2)
    logits = torch.tensor([-3.0, 0.5, 5.0, -torch.inf]) if sinks else None
    none = dict.fromkeys(
        ("window_right", "cu_seqlens_q", "cu_seqlens_k", "q_descale", "k_descale", "v_descale")
    )
    out, lse = flash.flash_forward(
        q, k, v, causal=True, window_left=70, softcap=0.0, sinks=logits, scale=0.125, **none
    )
    options = {"causal": True, "window": (70, 0), "scale": 0.125}
    exact = flash_oracle.flash_attention(
        q.double(), k.double(), v.double(), **options,
        sinks=None if logits is None else logits.double(),
    )  # fmt: skip
    rough = flash_oracle.flash_attention(
        q, k, v, **options, sinks=None if logits is None else logits.half()
    )
    assert_within_budget(out, exact[0], rough[0])
    torch.testing.assert_close(lse.double(), exact[1], atol=2e-5, rtol=2e-6)
    assert hopper.launches == 1


@pytest.mark.parametrize(
    ("q_len", "k_len", "block", "anchor"),
    [(700, 700, 128, 128), (200, 328, 512, 33), (500, 756, 384, 384), (30, 670, 256, 0)],
)
def test_star(hopper, stages, q_len, k_len, block, anchor):
    q, k, v = inputs(q_len, k_len, 2, 1)
    options = {"block_size": block, "anchor_size": anchor, "scale": 0.125}
    actual = star.star_context_forward(q, k, v, **options)
    agree(actual, star_oracle.star_context_attention, q, k, v, **options)
    assert hopper.launches == 1


def block_plan(axis, q_len, k_len, block_q, block_k, q_heads, kv_heads):
    """A random plan with lists out of order, holes (-1), and garbage behind the counts."""
    sets = {"shared": 1, "kv": kv_heads, "query": q_heads}[axis]
    rows, blocks = -(-q_len // block_q), -(-k_len // block_k)
    order = torch.rand(2, sets, rows, blocks).argsort(-1).int()
    counts = (torch.rand(2, sets, rows) * (blocks + 1)).int().clamp(max=blocks)
    counts[0, 0, 0] = 0
    order[torch.rand(order.shape) < 0.1] = -1
    order[torch.arange(blocks) >= counts.unsqueeze(-1)] = 10**6
    return BlockPlan(counts, order, block_q, block_k, axis)


def run_blocks(q, k, v, plan, causal=True):
    return block_sparse.block_sparse_forward(
        q, k, v, plan.counts, plan.indices, block_q=plan.block_q, block_k=plan.block_k,
        causal=causal, scale=0.125,
    )  # fmt: skip


LISTS = [
    # axis, block_q, block_k, q_len, k_len, causal, q_heads, kv_heads
    ("query", 128, 128, 700, 700, True, 2, 1),
    ("shared", 128, 128, 300, 401, False, 2, 1),
    ("kv", 64, 64, 333, 401, True, 4, 2),
    ("query", 128, 64, 300, 333, True, 2, 1),
    ("query", 256, 192, 600, 700, False, 1, 1),
    ("query", 512, 128, 300, 300, True, 2, 2),
    ("query", 128, 128, 300, 40, True, 1, 1),
]


@pytest.mark.parametrize("case", LISTS)
def test_lists(hopper, stages, case):
    axis, block_q, block_k, q_len, k_len, causal, q_heads, kv_heads = case
    q, k, v = inputs(q_len, k_len, q_heads, kv_heads, batch=2)
    plan = block_plan(axis, q_len, k_len, block_q, block_k, q_heads, kv_heads)
    actual = run_blocks(q, k, v, plan, causal)
    agree(
        actual, blocks_oracle.block_sparse_attention, q, k, v, plan, causal=causal, scale=0.125
    )  # fmt: skip
    assert hopper.launches == 1


@pytest.mark.parametrize("bins", [32, 1024])
@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("case", [*LISTS, ("query", 128, 64, 200, 40_000, True, 2, 1)])
def test_lists_become_walks(device, case, rising, bins):
    axis, block_q, block_k, q_len, k_len, causal, q_heads, kv_heads = case
    torch.manual_seed(3)
    plan = block_plan(axis, q_len, k_len, block_q, block_k, q_heads, kv_heads)
    if rising:
        blocks = torch.arange(plan.indices.shape[3], dtype=torch.int32)
        plan = BlockPlan(plan.counts, blocks.expand_as(plan.indices) * 2, block_q, block_k, axis)
    sizes = launch.walk_tiles(64, 64 if block_k % 128 else 128)
    rows = 64 if block_q == 64 else 128
    sets, tiles, each = plan.counts.shape[1], -(-q_len // rows), block_k // sizes.block_k
    room = -(-k_len // sizes.block_k)
    results = []
    for kernel, where in ((walk_list_kernel, device), (ListKernel(), "cpu")):
        counts, indices = plan.counts.to(where), plan.indices.to(where)
        starts = torch.full((2 * sets * tiles, room), -1, dtype=torch.int32, device=where)
        walks = torch.full((2 * sets * tiles, 2), -1, dtype=torch.int32, device=where)
        kernel[(2 * sets * tiles,)](
            counts, indices, starts, walks, *counts.stride(), *indices.stride(),
            sets, tiles, q_len, k_len, indices.shape[3], room, block_q, rows, each,
            BLOCK_K=sizes.block_k, ENTRIES=256, BINS=bins, CAUSAL=causal, num_warps=4,
        )  # fmt: skip
        results.append((starts.cpu(), walks.cpu()))
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(*results, strict=True))


def test_the_shipped_tiles(hopper):
    q, k, v = inputs(300, 300, 2, 1, batch=2, dim=128)
    plan = block_plan("kv", 300, 300, 128, 128, 2, 1)
    agree(run_blocks(q, k, v, plan), blocks_oracle.block_sparse_attention, q, k, v, plan,
          scale=0.125)  # fmt: skip
    assert hopper.launches == 1


def test_what_the_kernel_declines_runs_portably(hopper):
    q, k, v = inputs(130, 130, 2, 2, batch=2)
    options = {"window": 5, "sink_tokens": 2, "last_queries": 0}
    odd = torch.randn(2, 130, 2, 65).half()[..., 1:]
    for tensors, scale in (((q, k, v), -0.1), ((odd, k, v), 0.1)):
        plan = WindowPlan(5, 2)
        actual = block_sparse.window_sparse_forward(*tensors, None, **options, scale=scale)
        agree(actual, blocks_oracle.block_sparse_attention, *tensors, plan, scale=scale)
    star.star_context_forward(q, k, v, block_size=50, anchor_size=9, scale=0.1)
    # a first tile that begins before the queries
    star.star_context_forward(q[:, 7:], k, v, block_size=128, anchor_size=9, scale=0.1)
    for sizes in ((64, 64), (48, 16), (128, 80)):
        run_blocks(q, k, v, block_plan("query", 130, 130, *sizes, 2, 2))
    assert hopper.launches == 0
