"""Attention in tiles of queries by keys, in matrix products: what fused kernels cannot do.

The tiles of one step hold at most `BUDGET` bytes, however long the sequences are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BUDGET", "Band", "Step", "steps", "tiled_forward"]

BUDGET = 64 * 2**20
"""Bytes that the temporaries of one tile may take."""

_TEMPORARIES = 4  # score-sized tensors alive at once, at most (the backward pass)
_CPU_TILE = (256, 1024)  # rows of a group, keys: the temporaries fit a core's cache
_TILE = (1024, 4096)  # elsewhere few launches matter more


class Band(NamedTuple):
    """The keys that each query row sees: an interval around the row's position.

    Row ``i`` stands at ``i + shift`` and sees ``[i + shift - left, i + shift + right]`` cut to
    ``[0, k_len)``; None is unlimited.
    """

    left: int | None
    right: int | None
    shift: int
    k_len: int

    def keys(self, first: int, last: int) -> tuple[int, int]:
        """Return the interval ``[begin, end)`` that covers the keys of rows ``first..last``."""
        begin = 0 if self.left is None else max(0, first + self.shift - self.left)
        end = self.k_len
        if self.right is not None:
            end = max(0, min(end, last + self.shift + self.right + 1))
        return min(begin, end), end

    def shared(self, first: int, last: int) -> tuple[int, int]:
        """Return the interval that every one of the rows sees; empty if its end is no later."""
        return self.keys(last, last)[0], self.keys(first, first)[1]

    def outside(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Return the pairs ``[rows, keys]`` that are not seen."""
        distance = keys.unsqueeze(0) - (rows + self.shift).unsqueeze(1)
        out = torch.zeros_like(distance, dtype=torch.bool)
        if self.left is not None:
            out |= distance < -self.left
        if self.right is not None:
            out |= distance > self.right
        return out


class Step(NamedTuple):
    """One sequence, some KV heads and some query rows; ``tiles`` are ``(begin, end, masked)``."""

    batch: int
    heads: slice
    rows: slice
    tiles: list[tuple[int, int, bool]]


def steps(q: Tensor, k: Tensor, band: Band) -> Iterator[Step]:
    """Cut the work so that a tile ``[heads, group * rows, keys]`` stays inside the budget."""
    batch, q_len, q_heads, _ = q.shape
    kv_heads = k.shape[2]
    group = q_heads // kv_heads
    itemsize = 8 if q.dtype == torch.float64 else 4
    most_rows, most_keys = _CPU_TILE if q.device.type == "cpu" else _TILE
    scores = BUDGET // (_TEMPORARIES * itemsize)
    if q.device.type == "cpu":
        scores = min(scores, most_rows * most_keys)
    rows = max(1, min(q_len, most_rows // group))
    span = band.k_len
    if band.left is not None and band.right is not None:
        width = band.left + band.right + 1
        rows = min(rows, max(64, width))  # taller tiles would mostly hold unseen pairs
        span = min(span, width + rows)
    keys = max(1, min(most_keys, span, scores // (group * rows)))
    heads = max(1, min(kv_heads, scores // (group * rows * keys)))
    for b in range(batch):
        for h in range(0, kv_heads, heads):
            for r in range(0, q_len, rows):
                last = min(r + rows, q_len) - 1
                begin, end = band.keys(r, last)
                free = band.shared(r, last)
                tiles = [
                    (j, min(j + keys, end), j < free[0] or min(j + keys, end) > free[1])
                    for j in range(begin, end, keys)
                ]
                yield Step(b, slice(h, min(h + heads, kv_heads)), slice(r, last + 1), tiles)


def grouped_rows(t: Tensor, step: Step, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Return ``t [B, Sq, Hq, D]`` cut to a step as ``[heads, group * rows, D]``."""
    part = torch.unflatten(t[step.batch, step.rows], 1, (kv_heads, -1))[:, step.heads]
    return part.permute(1, 2, 0, 3).to(dtype).flatten(1, 2)


def keys_of(t: Tensor, step: Step, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Return ``t [B, Sk, Hkv, D]`` cut to a tile as ``[heads, keys, D]``."""
    return t[step.batch, begin:end, step.heads].transpose(0, 1).to(dtype)


def capped(scores: Tensor, softcap: float) -> Tensor:
    """Return ``c tanh(s / c)``, in place; ``softcap`` 0 is off."""
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def hide(scores: Tensor, step: Step, tile: tuple[int, int, bool], band: Band, fill: float) -> None:
    """Fill the unseen pairs of ``scores [heads, group * rows, keys]``."""
    begin, end, masked = tile
    if not masked:
        return
    rows = torch.arange(step.rows.start, step.rows.stop, device=scores.device)
    unseen = band.outside(rows, torch.arange(begin, end, device=scores.device))
    torch.unflatten(scores, 1, (-1, rows.shape[0])).masked_fill_(unseen, fill)


def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, *, band: Band, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(out [B, Sq, Hq, Dv], lse [B, Hq, Sq])`` by an online softmax over key tiles.

    Scores and sums are fp32 (fp64 for fp64 inputs); a row without keys gives out 0, lse -inf.
    """
    batch, q_len, q_heads, _ = q.shape
    kv_heads, value_dim = v.shape[2], v.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, q_len, q_heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, q_heads, q_len, dtype=dtype, device=q.device)
    out5 = torch.unflatten(out, 2, (kv_heads, -1))
    lse4 = torch.unflatten(lse, 1, (kv_heads, -1))
    for step in steps(q, k, band):
        rows = grouped_rows(q, step, kv_heads, dtype) * scale
        sums = rows.new_zeros(*rows.shape[:2], value_dim)
        total = rows.new_zeros(*rows.shape[:2], 1)
        top = rows.new_full((*rows.shape[:2], 1), -torch.inf)
        for tile in step.tiles:
            begin, end, _ = tile
            keys = keys_of(k, step, begin, end, dtype)
            scores = capped(torch.bmm(rows, keys.transpose(1, 2)), softcap)
            hide(scores, step, tile, band, -torch.inf)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            shift = torch.where(higher == -torch.inf, 0.0, higher)  # -inf - -inf would be NaN
            weights = scores.sub_(shift).exp_()
            fade = torch.exp(top - shift)
            total = total.mul_(fade).add_(weights.sum(-1, keepdim=True))
            sums = sums.mul_(fade).baddbmm_(weights, keys_of(v, step, begin, end, dtype))
            top = higher
        sums /= torch.where(total == 0, 1.0, total)
        count = step.rows.stop - step.rows.start
        rows_out = torch.unflatten(sums, 1, (-1, count)).permute(2, 0, 1, 3)
        out5[step.batch, step.rows, step.heads] = rows_out.to(q.dtype)
        rows_lse = (top + total.log()).squeeze(-1)
        lse4[step.batch, step.heads, :, step.rows] = torch.unflatten(rows_lse, 1, (-1, count))
    return out, lse
