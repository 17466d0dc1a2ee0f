"""Lowering: one plan into another that more backends run, never losing a pair.

Every conversion is explicit, may only enlarge what is kept, and reports what that costs as a
`LoweringCost`. Lowering reads counts on the host, which synchronises a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from longctx.plans import BlockPlan, HeadAxis, Plan, StripePlan, TokenSetPlan, TopKPlan, WindowPlan

__all__ = [
    "LoweringCost",
    "heads_to_kv",
    "stripes_to_blocks",
    "topk_to_blocks",
    "window_to_blocks",
]

HeadPlan = TypeVar("HeadPlan", bound=BlockPlan | StripePlan | TokenSetPlan | WindowPlan)


@dataclass(frozen=True, slots=True)
class LoweringCost:
    """Density before and after a conversion: kept pairs / causal pairs.

    Attributes
    ----------
    before, after : float
        ``after`` is never below ``before``.
    """

    before: float
    after: float

    @property
    def factor(self) -> float:
        """How many times more pairs are kept; 1.0 for a free conversion."""
        return self.after / self.before if self.before else (torch.inf if self.after else 1.0)


def heads_to_kv(
    plan: HeadPlan, *, kv_heads: int, q_len: int, k_len: int
) -> tuple[HeadPlan, LoweringCost]:
    """Give the query heads of a KV head one set: the union of theirs.

    Parameters
    ----------
    plan : BlockPlan, StripePlan, TokenSetPlan or WindowPlan
        A plan for query heads; others are returned as they are. The widest window of a group
        stands for its heads in a `WindowPlan`, which keeps its query-head axis.
    kv_heads : int
    q_len, k_len : int
        Lengths of the call.

    Returns
    -------
    plan, LoweringCost

    Examples
    --------
    >>> import torch
    >>> from longctx.lowering import heads_to_kv
    >>> from longctx.plans import WindowPlan
    >>> plan = WindowPlan(0, head_windows=torch.tensor([1, 3, 2, 2], dtype=torch.int32))
    >>> heads_to_kv(plan, kv_heads=2, q_len=8, k_len=8)[0].head_windows.tolist()
    [3, 3, 2, 2]
    """
    changes: dict[str, Any] = {}
    if isinstance(plan, WindowPlan):
        if plan.head_windows is not None:
            groups = _by_kv_head(plan.head_windows, 0, kv_heads)
            widest = groups.amax(1, keepdim=True).expand_as(groups)
            changes = {"head_windows": widest.flatten()}
    elif plan.head_axis == "query":
        changes = {"head_axis": "kv"}
        size = -(-k_len // plan.block_k) if isinstance(plan, BlockPlan) else k_len
        for sets, sizes in _sets(plan):
            member = _member(getattr(plan, sets), getattr(plan, sizes), size)
            changes[sets], changes[sizes] = _compact(_by_kv_head(member, 1, kv_heads).any(2))
    lowered = replace(plan, **changes) if changes else plan
    return lowered, _cost(plan, lowered, q_len, k_len)


def stripes_to_blocks(
    plan: StripePlan, *, block_q: int, block_k: int, q_len: int, k_len: int
) -> tuple[BlockPlan, LoweringCost]:
    """Keep every block that a column or a diagonal touches.

    Parameters
    ----------
    plan : StripePlan
    block_q, block_k : int
        Tokens a block of queries and of keys.
    q_len, k_len : int
        Lengths of the call.

    Returns
    -------
    BlockPlan, LoweringCost

    Examples
    --------
    >>> import torch
    >>> from longctx.lowering import stripes_to_blocks
    >>> from longctx.plans import StripePlan
    >>> none, one = torch.zeros(1, 1, 0, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)
    >>> plan = StripePlan(none, 0 * one, torch.zeros(1, 1, 1, dtype=torch.int32), one, "shared")
    >>> lowered, cost = stripes_to_blocks(plan, block_q=4, block_k=4, q_len=8, k_len=8)
    >>> lowered.indices.flatten().tolist(), round(cost.factor, 3)
    ([0, 1], 2.5)
    """
    tiles = _Tiling(block_q, block_k, q_len, k_len, plan.vertical.device)
    real = _real(plan.vertical, plan.vertical_counts)
    inside = real & (plan.vertical < k_len)
    # the first kept column of each key block decides from which query block on it is seen
    first = torch.full((*plan.vertical.shape[:2], tiles.k_blocks + 1), k_len, device=tiles.device)
    slots = torch.where(inside, plan.vertical // block_k, tiles.k_blocks).long()
    first = first.scatter_reduce(2, slots, plan.vertical.long(), "amin")[..., :-1]
    columns = first.unsqueeze(2) <= tiles.last
    # [B, Hx, Nq, S]: the keys of one diagonal are consecutive within a query block
    distance = plan.slash.unsqueeze(2).long()
    lowest = (tiles.start - distance).clamp(min=0)
    highest = tiles.last - distance
    on = _real(plan.slash, plan.slash_counts).unsqueeze(2) & (highest >= 0)
    diagonals = _touched(lowest // block_k, highest // block_k, on, tiles.k_blocks)
    lowered = _block_plan(columns | diagonals, block_q, block_k, plan.head_axis)
    return lowered, _cost(plan, lowered, q_len, k_len)


def window_to_blocks(
    plan: WindowPlan,
    *,
    block_q: int,
    block_k: int,
    q_len: int,
    k_len: int,
    batch: int = 1,
    device: torch.device | None = None,
) -> tuple[BlockPlan, LoweringCost]:
    """Keep every block that the window, a sink token or a dense last row touches.

    Parameters
    ----------
    plan : WindowPlan
    block_q, block_k : int
        Tokens a block of queries and of keys.
    q_len, k_len : int
        Lengths of the call.
    batch : int
        Batch of the call; every entry gets the same blocks.
    device : torch.device, optional
        Where the plan is to live; default: that of ``head_windows``, else the CPU.

    Returns
    -------
    BlockPlan, LoweringCost

    Examples
    --------
    >>> from longctx.lowering import window_to_blocks
    >>> from longctx.plans import WindowPlan
    >>> plan = WindowPlan(window=2, sink_tokens=1)
    >>> lowered, _ = window_to_blocks(plan, block_q=4, block_k=4, q_len=12, k_len=12)
    >>> lowered.counts.tolist()
    [[[1, 2, 3]]]
    """
    windows = plan.head_windows
    if device is None:
        device = torch.device("cpu") if windows is None else windows.device
    tiles = _Tiling(block_q, block_k, q_len, k_len, device)
    begin = torch.arange(tiles.k_blocks, device=device) * block_k
    reach: Tensor | int = plan.window
    if windows is not None:
        reach = windows.to(device).long().view(1, -1, 1, 1)
    kept = (begin + block_k - 1 >= tiles.start - reach) | (begin < plan.sink_tokens)
    kept = (kept | (tiles.last >= k_len - plan.last_queries)) & (begin <= tiles.last)
    kept = kept.expand(batch, 1 if windows is None else windows.shape[0], -1, -1)
    lowered = _block_plan(kept, block_q, block_k, "shared" if windows is None else "query")
    return lowered, _cost(plan, lowered, q_len, k_len)


def topk_to_blocks(
    plan: TopKPlan, *, block_q: int, block_k: int, k_len: int
) -> tuple[BlockPlan, LoweringCost]:
    """Keep every block that holds a chosen key of one of its queries.

    Parameters
    ----------
    plan : TopKPlan
        Causal, as a BlockPlan is: a chosen key behind its query is an error.
    block_q, block_k : int
        Tokens a block of queries and of keys.
    k_len : int
        Keys of the call.

    Returns
    -------
    BlockPlan, LoweringCost

    Raises
    ------
    ValueError
        If the plan chooses a key behind its query.

    Examples
    --------
    >>> import torch
    >>> from longctx.lowering import topk_to_blocks
    >>> from longctx.plans import TopKPlan
    >>> plan = TopKPlan(torch.tensor([0, 0, 1, 0], dtype=torch.int32).view(1, 4, 1, 1))
    >>> topk_to_blocks(plan, block_q=2, block_k=2, k_len=4)[0].counts.tolist()
    [[[1, 1]]]
    """
    q_len = plan.indices.shape[1]
    tiles = _Tiling(block_q, block_k, q_len, k_len, plan.indices.device)
    position = torch.arange(k_len - q_len, k_len, device=tiles.device).view(1, -1, 1, 1)
    lowest = plan.indices.long() * plan.page_size
    real = plan.indices >= 0
    if bool((real & (lowest > position)).any()):
        raise ValueError("a TopKPlan that chooses keys behind the query has no causal BlockPlan")
    highest = torch.minimum(lowest + plan.page_size - 1, position)

    def by_tile(rows: Tensor) -> Tensor:
        """Return ``[B, Hx, Nq, block_q * K]`` from ``[B, Sq, Hx, K]``, padded with 0."""
        missing = tiles.start.shape[0] * block_q - q_len
        rows = torch.nn.functional.pad(rows.transpose(1, 2), (0, 0, 0, missing))
        return rows.reshape(*rows.shape[:2], -1, block_q * rows.shape[3])

    low, high, on = by_tile(lowest // block_k), by_tile(highest // block_k), by_tile(real)
    kept = _touched(low, high, on, tiles.k_blocks)
    lowered = _block_plan(kept, block_q, block_k, plan.head_axis)
    return lowered, _cost(plan, lowered, q_len, k_len)


class _Tiling:
    """Query blocks over the last ``q_len`` of ``k_len`` positions."""

    def __init__(
        self, block_q: int, block_k: int, q_len: int, k_len: int, device: torch.device
    ) -> None:
        if block_q < 1 or block_k < 1:
            raise ValueError(f"block sizes must be positive, got {block_q} x {block_k}")
        self.device = device
        self.k_blocks = -(-k_len // block_k)
        first = k_len - q_len
        self.start = torch.arange(first, k_len, block_q, device=device).unsqueeze(1)
        """First position of each query block, ``[Nq, 1]``."""
        self.last = (self.start + block_q - 1).clamp(max=k_len - 1)
        """Last position of each query block, ``[Nq, 1]``."""


def _cost(plan: Plan, lowered: Plan, q_len: int, k_len: int) -> LoweringCost:
    return LoweringCost(plan.density(q_len, k_len), lowered.density(q_len, k_len))


def _by_kv_head(tensor: Tensor, axis: int, kv_heads: int) -> Tensor:
    """Split an axis of query heads into ``kv_heads`` and the group."""
    heads = tensor.shape[axis]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"the plan's {heads} query heads must be a multiple of kv_heads={kv_heads}"
        )
    shape = tensor.shape
    return tensor.reshape(*shape[:axis], kv_heads, heads // kv_heads, *shape[axis + 1 :])


def _sets(plan: BlockPlan | StripePlan | TokenSetPlan) -> tuple[tuple[str, str], ...]:
    """Return the names of a plan's padded sets and of their counts."""
    if isinstance(plan, StripePlan):
        return ("vertical", "vertical_counts"), ("slash", "slash_counts")
    return (("indices", "counts"),)


def _real(indices: Tensor, counts: Tensor) -> Tensor:
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return (slots < counts.unsqueeze(-1)) & (indices >= 0)


def _member(indices: Tensor, counts: Tensor, size: int) -> Tensor:
    """Return membership ``[..., size]`` of padded sets ``[..., C]``."""
    slots = torch.where(_real(indices, counts) & (indices < size), indices, size).long()
    member = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return member.scatter_(-1, slots, True)[..., :size]


def _compact(member: Tensor) -> tuple[Tensor, Tensor]:
    """Return (indices ascending and -1 padded, counts) of membership ``[..., n]``."""
    counts = member.sum(-1, dtype=torch.int32)
    capacity = max(int(counts.max()) if counts.numel() else 0, 1)
    order = member.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :capacity]
    slots = torch.arange(order.shape[-1], device=member.device)
    return order.to(torch.int32).where(slots < counts.unsqueeze(-1), -1), counts


def _block_plan(member: Tensor, block_q: int, block_k: int, head_axis: HeadAxis) -> BlockPlan:
    indices, counts = _compact(member)
    return BlockPlan(counts, indices, block_q, block_k, head_axis)


def _touched(low: Tensor, high: Tensor, on: Tensor, blocks: int) -> Tensor:
    """Return the blocks inside any inclusive range ``[low, high] [..., R]`` that is on."""
    # ends of ranges as steps up and down, so that one running sum covers them all
    steps = torch.zeros(*low.shape[:-1], blocks + 1, dtype=torch.int32, device=low.device)
    weight = on.to(torch.int32)
    steps.scatter_add_(-1, low.clamp(0, blocks), weight)
    steps.scatter_add_(-1, (high + 1).clamp(0, blocks), -weight)
    return steps.cumsum(-1)[..., :blocks] > 0
