"""Compact tensors: the tokens of a set side by side, and back to their rows.

A compact tensor holds the tokens of each head's set in ascending order, zeros behind them. Causal
attention over compact tensors is causal attention over the set, and its real rows never reach the
zeros. Sets are slots ``[B, Hx, n]``, -1 for none, with ``Hx`` sets shared evenly by the heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gather_tokens", "occupied_width", "restore_rows", "rows_of_slots", "valid_slots"]


def occupied_width(indices: Tensor, counts: Tensor, first_position: int) -> tuple[int, int]:
    """Return the largest count, and the least compact row that is one of the queries.

    Both are read on the host; where that is impossible (under `torch.compile`, and while a CUDA
    graph is captured) they are the capacity and 0, which is right but saves no work.
    """
    capacity = indices.shape[2]
    if torch.compiler.is_compiling() or (
        indices.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return capacity, 0
    if counts.numel() == 0:
        return 0, 0
    earlier = (valid_slots(indices, counts) >= 0) & (indices < first_position)
    width, start = torch.stack([counts.max(), earlier.sum(-1).min()]).tolist()
    return min(width, capacity), start


def valid_slots(indices: Tensor, counts: Tensor) -> Tensor:
    """Return ``indices`` with -1 behind each count."""
    inside = torch.arange(indices.shape[2], device=indices.device) < counts.unsqueeze(2)
    return indices.where(inside, -1)


def gather_tokens(x: Tensor, slots: Tensor, heads: int) -> Tensor:
    """Return ``[B, n, heads, D]``, zeros where a slot is -1.

    Parameters
    ----------
    x : Tensor, (batch, seq, x_heads, D)
        ``x_heads`` divides ``heads``: query-head sets turn KV heads into one a query head.
    slots : Tensor, (batch, sets, n)
        Rows of ``x``; ``sets`` divides ``heads``.
    heads : int
    """
    rows = slots.repeat_interleave(heads // slots.shape[1], 1).transpose(1, 2)
    batch = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)
    source = torch.arange(heads, device=x.device) // (heads // x.shape[2])
    compact = x[batch, rows.clamp(min=0).long(), source]
    return compact.masked_fill_((rows < 0).unsqueeze(-1), 0)


def rows_of_slots(slots: Tensor, rows: int) -> Tensor:
    """Return the inverse ``[B, Hx, rows]`` of slots ``[B, Hx, n]``: a row's slot, or -1."""
    inverse = torch.full((*slots.shape[:2], rows + 1), -1, dtype=torch.int64, device=slots.device)
    places = torch.arange(slots.shape[2], device=slots.device).expand(slots.shape)
    # the slots without a row all write behind the last row, which is cut off
    return inverse.scatter_(2, slots.where(slots >= 0, rows).long(), places)[..., :rows]


def restore_rows(compact: Tensor, inverse: Tensor, empty: float) -> Tensor:
    """Return ``[B, rows, heads, D]`` from ``[B, n, heads, D]``; ``empty`` without a slot."""
    heads = compact.shape[2]
    slots = inverse.repeat_interleave(heads // inverse.shape[1], 1).transpose(1, 2)
    batch = torch.arange(compact.shape[0], device=compact.device).view(-1, 1, 1)
    head = torch.arange(heads, device=compact.device)
    rows = compact[batch, slots.clamp(min=0), head]
    return rows.masked_fill_((slots < 0).unsqueeze(-1), empty)
