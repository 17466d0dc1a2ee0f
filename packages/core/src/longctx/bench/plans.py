"""Random plans of a given size: the sets that the sparse ops are measured on, always the same."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.plans import BlockPlan, StripePlan, TokenSetPlan, WindowPlan

__all__ = [
    "block_sparse_plan",
    "on_device",
    "sequence_ends",
    "token_set_plan",
    "topk_indices",
]

SEED = 20241


@functools.lru_cache(maxsize=8)
def block_sparse_plan(case: Case) -> BlockPlan | StripePlan | WindowPlan:
    """Return the plan of a ``block_sparse_attention`` case, on the CPU.

    ``block``: each query block keeps its own key block and random earlier ones, ``density`` of all
    it may see, one set a KV head. ``stripe``: random columns and random diagonals, the main one
    among them, one set a query head (MInference, arXiv 2407.02490). ``window``: first tokens and a
    sliding window.
    """
    generator = torch.Generator().manual_seed(SEED)
    if case.plan == "window":
        assert case.window is not None
        return WindowPlan(case.window, sink_tokens=case["sink_tokens"])
    if case.plan == "stripe":
        shape = (case["batch"], case["q_heads"])
        columns = _distinct(shape, case.k_len, case["columns"], generator)
        later = _distinct(shape, case.k_len - 1, case["diagonals"] - 1, generator) + 1
        diagonals = torch.cat([torch.zeros(*shape, 1, dtype=torch.int32), later], -1)
        sizes = [torch.full(shape, s.shape[-1], dtype=torch.int32) for s in (columns, diagonals)]
        return StripePlan(columns, sizes[0], diagonals, sizes[1], "query")
    return _block_plan(case, generator)


def _block_plan(case: Case, generator: torch.Generator) -> BlockPlan:
    assert case.density is not None
    size, heads = case["block"], case["batch"] * case["kv_heads"]
    blocks = -(-case.q_len // size)
    earlier = torch.arange(blocks)
    kept = ((earlier + 1) * case.density).ceil().long().clamp(min=1)
    capacity = int(kept.max())
    # random numbers rank the earlier blocks of each row; the row's own block ranks first
    rank = torch.rand(heads, blocks, blocks, generator=generator)
    rank = rank.masked_fill(earlier.unsqueeze(0) > earlier.unsqueeze(1), -1)
    rank.diagonal(dim1=1, dim2=2).fill_(2)
    best = rank.topk(capacity, -1).indices
    outside = torch.arange(capacity) >= kept.unsqueeze(1)
    indices = best.masked_fill(outside, blocks).sort(-1).values.masked_fill(outside, -1)
    shape = (case["batch"], case["kv_heads"], blocks)
    counts = kept.to(torch.int32).expand(shape).contiguous()
    return BlockPlan(counts, indices.to(torch.int32).view(*shape, capacity), size, size, "kv")


@functools.lru_cache(maxsize=8)
def token_set_plan(case: Case) -> TokenSetPlan:
    """Return random sets of ``density`` of the tokens, one a query head, on the CPU."""
    assert case.density is not None
    generator = torch.Generator().manual_seed(SEED)
    shape, kept = (case["batch"], case["q_heads"]), max(1, round(case.density * case.k_len))
    indices = _distinct(shape, case.k_len, kept, generator)
    return TokenSetPlan(indices, torch.full(shape, kept, dtype=torch.int32), "query")


def topk_indices(case: Case, device: torch.device) -> Tensor:
    """Return random keys of each query, int32 ``[batch, q_len, kv_heads, top_k]``, then -1.

    Ascending: one key of each of ``top_k`` equal stretches of what the query sees; all of it where
    it sees no more than ``top_k``.
    """
    generator = torch.Generator(device=device).manual_seed(SEED)
    batch, q_len, k_len, top_k = case["batch"], case.q_len, case.k_len, case["top_k"]
    seen = torch.arange(k_len - q_len + 1, k_len + 1, device=device).view(1, -1, 1, 1)
    slots = torch.arange(top_k, device=device)
    start, stop = slots * seen // top_k, (slots + 1) * seen // top_k
    shape = (batch, q_len, case["kv_heads"], top_k)
    share = torch.rand(shape, device=device, generator=generator, dtype=torch.double)
    # rand may round up to 1 after the product: the clamp keeps a key inside its stretch
    inside = torch.minimum(start + (share * (stop - start)).long(), stop - 1)
    few = torch.where(slots < seen, slots, -1)
    return torch.where(seen > top_k, inside, few).to(torch.int32)


def sequence_ends(case: Case) -> Tensor | None:
    """Return where the sequences of a packed case meet, int32 ``[sequences + 1]``, on the CPU.

    At random, from 0 to ``seq``: what the ops call ``cu_seqlens``. None for a case of one length.
    """
    sequences = case.get("sequences", 1)
    if sequences == 1:
        return None
    generator = torch.Generator().manual_seed(SEED)
    inner = _distinct((), case.k_len - 1, sequences - 1, generator) + 1
    return torch.tensor([0, *inner.tolist(), case.k_len], dtype=torch.int32)


def on_device(
    plan: BlockPlan | StripePlan | WindowPlan | TokenSetPlan, device: torch.device
) -> BlockPlan | StripePlan | WindowPlan | TokenSetPlan:
    """Return the plan with its tensors on a device."""
    if isinstance(plan, BlockPlan):
        tensors = plan.counts.to(device), plan.indices.to(device)
        return BlockPlan(*tensors, plan.block_q, plan.block_k, plan.head_axis)
    if isinstance(plan, StripePlan):
        columns = plan.vertical.to(device), plan.vertical_counts.to(device)
        diagonals = plan.slash.to(device), plan.slash_counts.to(device)
        return StripePlan(*columns, *diagonals, plan.head_axis)
    if isinstance(plan, TokenSetPlan):
        return TokenSetPlan(plan.indices.to(device), plan.counts.to(device), plan.head_axis)
    return plan


def _distinct(
    shape: tuple[int, ...], below: int, count: int, generator: torch.Generator
) -> Tensor:
    """Return ascending sets of ``count`` distinct numbers, int32 ``[*shape, count]``."""
    sets = 1
    for size in shape:
        sets *= size
    rows = [torch.randperm(below, generator=generator)[:count].sort().values for _ in range(sets)]
    return torch.stack(rows).to(torch.int32).view(*shape, count)
