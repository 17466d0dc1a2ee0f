"""Softmax over keys that arrive in pieces: what the sparse families of this backend share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longctx.settings import budget_bytes

__all__ = ["HeadTiles", "RunningSoftmax", "budget_elements", "groups", "wide_dtype"]

# more than this falls out of a CPU's cache (2^18 to 2^24 measured)
CPU_ELEMENTS = 1 << 21


def budget_elements(tensor: Tensor) -> int:
    """Return how many elements of scores and gathered keys may be held at a time."""
    size = budget_bytes("LONGCTX_CHUNK_BUDGET_MIB") // wide_dtype(tensor).itemsize
    return min(size, CPU_ELEMENTS) if tensor.device.type == "cpu" else size


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class RunningSoftmax:
    """Online softmax (Milakov & Gimelshein, arXiv 1805.02867): exact in any order of the pieces.

    Parameters
    ----------
    rows : sequence of int
        Shape of the rows, ``(..., M)``.
    value_dim : int
    like : Tensor
        Gives device and dtype.
    """

    def __init__(self, rows: Sequence[int], value_dim: int, like: Tensor) -> None:
        self._max = like.new_full((*rows, 1), -torch.inf)
        self._sum = like.new_zeros((*rows, 1))
        self._out = like.new_zeros((*rows, value_dim))

    def add(self, scores: Tensor, v: Tensor) -> None:
        """Take in one piece: ``scores [..., M, w]``, -inf where masked, and ``v [..., w, Dv]``.

        The scores are overwritten.
        """
        if scores.shape[-1] == 0:
            return
        maximum = torch.maximum(self._max, scores.amax(-1, keepdim=True))
        # a row that has seen nothing has maximum -inf, which must not be subtracted from itself
        shift = maximum.masked_fill(maximum == -torch.inf, 0)
        weights = scores.sub_(shift).exp_()
        fade = torch.exp(self._max - shift)
        self._sum.mul_(fade).add_(weights.sum(-1, keepdim=True))
        self._out.mul_(fade).add_(weights @ v)
        self._max = maximum

    def result(self) -> tuple[Tensor, Tensor]:
        """Return ``out [..., M, Dv]`` and ``lse [..., M]``; 0 and -inf for a row without keys."""
        out = self._out / self._sum.masked_fill(self._sum == 0, 1)
        return out, (self._max + self._sum.log()).squeeze(-1)


class HeadTiles:
    """One KV head with the query heads that share a set of keys, the queries in tiles.

    Parameters
    ----------
    q : Tensor, (q_len, group, head_dim)
        Queries of the heads that share the set.
    k : Tensor, (k_len, head_dim)
    v : Tensor, (k_len, value_dim)
    out : Tensor, (q_len, group, value_dim)
        Written to, tile by tile.
    lse : Tensor, (q_len, group)
        Likewise.
    size : int
        Query tokens a tile; the last tile may be ragged.
    scale : float
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        size: int,
        scale: float,
    ) -> None:
        self._q, self._k, self._v, self._out, self._lse = q, k, v, out, lse
        self._scale = scale
        self.size, self.count = size, -(-q.shape[0] // size)
        self.first = k.shape[0] - q.shape[0]

    def keys_at_once(self) -> int:
        """Return how many keys the budget allows, summed over the tiles attended together."""
        per_key = self.size * self._q.shape[1] + self._k.shape[1] + self._v.shape[1]
        return max(1, budget_elements(self._q) // per_key)

    def tokens(self, tiles: Tensor) -> Tensor:
        """Return the query rows ``[R, size]`` of some tiles; a ragged tile names rows too many."""
        return tiles.unsqueeze(1) * self.size + torch.arange(self.size, device=tiles.device)

    def attend(self, tiles: Tensor, keys: Tensor, keep: Callable[[slice], Tensor]) -> None:
        """Attend ``keys [R, W]`` from some tiles.

        ``keys`` are positions, -1 for none; ``keep`` gives the pairs ``[R, size, w]`` (or
        broadcastable) of a slice of the keys. Keys of -1 are never kept.
        """
        shape = (self.size, self._q.shape[1])
        tokens = self.tokens(tiles)
        inside = tokens < self._q.shape[0]
        q = self._q[tokens.where(inside, 0)].flatten(1, 2)
        q = q.to(wide_dtype(q)).mul_(self._scale)
        softmax = RunningSoftmax(q.shape[:2], self._v.shape[1], q)
        step = max(1, self.keys_at_once() // max(len(tiles), 1))
        for start in range(0, keys.shape[1], step):
            piece = slice(start, start + step)
            there = keys[:, piece] >= 0
            gathered = keys[:, piece].clamp(min=0)
            k, v = (t[gathered].to(q.dtype) for t in (self._k, self._v))
            # what stands at a slot without a key may be anything, and 0 * NaN is NaN
            v.masked_fill_(~there.unsqueeze(-1), 0)
            pairs = (keep(piece) & there.unsqueeze(1)).unsqueeze(2)
            scores = torch.unflatten(q @ k.mT, 1, shape)
            softmax.add(scores.masked_fill_(~pairs, -torch.inf).flatten(1, 2), v)
        out, lse = (torch.unflatten(t, 1, shape)[inside] for t in softmax.result())
        rows = tokens[inside]
        self._out[rows], self._lse[rows] = out.to(self._out.dtype), lse


def groups(widths: Sequence[int], keys_at_once: int) -> Iterator[tuple[list[int], int]]:
    """Yield (tiles, width) with tiles of similar widths together, each group within the budget.

    Tiles without keys are left out.
    """
    order = sorted((n for n, width in enumerate(widths) if width > 0), key=widths.__getitem__)
    while order:
        width = widths[order[-1]]
        size = max(1, keys_at_once // width)
        yield order[-size:], width
        del order[-size:]
