"""Exact top-k of the lightning indexer in bounded memory, and the score tile that it shares.

A (score, position) pair becomes one int64 key: the score's bits, made monotone, above the negated
position. Keys are unique, so any top-k of keys is the top-k of scores with ties broken towards the
lower position, run after run. Rows keep their best keys so far while key tiles stream past.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.settings import budget_bytes

__all__ = ["hidden_keys", "index_topk_forward", "score_tile", "wide"]

LAST_POSITION = 2**31 - 1
NOTHING = -(2**63)
"""The key of a slot that holds no choice; its position reads as `LAST_POSITION`."""

MOST_ROWS = 256
TILE_KEYS = {"cpu": 2048}
"""Keys scored at once: on a CPU a tile of `MOST_ROWS` rows stays in the cache."""
TILE_KEYS_ELSEWHERE = 16384


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def score_tile(q: Tensor, k: Tensor, weights: Tensor, k_scale: Tensor | None) -> Tensor:
    """Return ``[R, T]`` scores of ``q [Hi, R, D]``, ``k [T, D]``, ``weights [R, Hi]``.

    Heads are added one by one, in order: two ``R x T`` buffers whatever their number.
    """
    scores = torch.zeros(q.shape[1], k.shape[0], dtype=q.dtype, device=q.device)
    dots = torch.empty_like(scores)
    for head in range(q.shape[0]):
        torch.mm(q[head], k.t(), out=dots)
        scores.addcmul_(dots.relu_(), weights[:, head : head + 1])
    return scores if k_scale is None else scores.mul_(k_scale)


def hidden_keys(
    rows: tuple[int, int],
    keys: tuple[int, int],
    *,
    shift: int | None,
    start: Tensor | None,
    end: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Return which keys of a tile its rows may not see, bool ``[R, T]``; None if they see all.

    ``shift`` is the position of query 0 under causality, None without; ``start`` and ``end`` bound
    the keys of every query row of the batch entry.
    """
    columns = torch.arange(*keys, device=device)
    hidden = None
    if shift is not None and keys[1] - 1 > rows[0] + shift:
        positions = torch.arange(rows[0] + shift, rows[1] + shift, device=device)
        hidden = columns > positions.unsqueeze(1)
    if start is not None:
        below = columns < start[rows[0] : rows[1]].unsqueeze(1)
        hidden = below if hidden is None else hidden.logical_or_(below)
    if end is not None:
        above = columns >= end[rows[0] : rows[1]].unsqueeze(1)
        hidden = above if hidden is None else hidden.logical_or_(above)
    return hidden


def index_topk_forward(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    top_k: int,
    *,
    causal: bool,
    key_start: Tensor | None,
    key_end: Tensor | None,
    deterministic: bool,
) -> Tensor:
    """Implement `longctx.protocols.attention.SparseIndexer.index_topk_forward`.

    Deterministic whatever is asked. What it holds besides inputs and result stays within
    ``LONGCTX_INDEX_BUDGET_MIB`` as long as one row of 16 keys fits.
    """
    batch, q_len, heads, dim = q.shape
    k_len = k.shape[1]
    result = torch.full((batch, q_len, top_k), -1, dtype=torch.int32, device=q.device)
    rows, width, tile = _tile_sizes(q_len, k_len, heads, dim, top_k, q.device.type)
    buffer = torch.empty(rows * (top_k + width), dtype=torch.int64, device=q.device)
    shift = k_len - q_len if causal else None
    for b in range(batch):
        start = None if key_start is None else key_start[b]
        end = None if key_end is None else key_end[b]
        for first in range(0, q_len, rows):
            last = min(first + rows, q_len)
            row_queries = q[b, first:last].transpose(0, 1).float()
            row_weights = weights[b, first:last].float()
            low, high = _key_span((first, last), k_len, shift, start, end)
            best = buffer.new_empty(last - first, 0)
            for key0 in range(low, high, width):
                key1 = min(key0 + width, high)
                held = best.shape[1]
                merged = buffer[: (last - first) * (held + key1 - key0)].view(last - first, -1)
                merged[:, :held] = best
                for tile0 in range(key0, key1, tile):
                    span = (tile0, min(tile0 + tile, key1))
                    scores = score_tile(
                        row_queries,
                        k[b, span[0] : span[1]].float(),
                        row_weights,
                        None if k_scale is None else k_scale[b, span[0] : span[1]].float(),
                    )
                    hidden = hidden_keys(
                        (first, last), span, shift=shift, start=start, end=end, device=q.device
                    )
                    at = held + tile0 - key0
                    _write_keys(merged[:, at : at + span[1] - span[0]], scores, hidden, tile0)
                best = merged.topk(min(top_k, merged.shape[1]), sorted=False).values
            result[b, first:last, : best.shape[1]] = _positions(best)
    return result


def _tile_sizes(
    q_len: int, k_len: int, heads: int, dim: int, top_k: int, device_type: str
) -> tuple[int, int, int]:
    """Return rows at a time, keys between two merges and keys scored at once, by the budget."""
    budget = budget_bytes("LONGCTX_INDEX_BUDGET_MIB")
    tile = TILE_KEYS.get(device_type, TILE_KEYS_ELSEWHERE)
    tile = max(1, min(tile, k_len, max(16, budget // (64 * 24))))
    budget -= tile * dim * 8
    # best so far, its copy in the buffer and top-k's two results; scores, products and masks of a
    # tile; the queries, widened and turned
    row_bytes = 32 * top_k + 16 * tile + 8 * heads * dim
    least = min(k_len, max(tile, 2 * top_k))
    rows = max(1, min(q_len, MOST_ROWS, budget // (row_bytes + 8 * least)))
    width = max(tile, min(k_len, (budget // rows - row_bytes) // 8))
    return rows, width, tile


def _key_span(
    rows: tuple[int, int],
    k_len: int,
    shift: int | None,
    start: Tensor | None,
    end: Tensor | None,
) -> tuple[int, int]:
    """Return the keys that any of the rows may see; bounds on a GPU are not read."""
    low, high = 0, k_len if shift is None else max(0, min(k_len, rows[1] + shift))
    if start is not None and start.device.type == "cpu":
        low = max(low, int(start[rows[0] : rows[1]].min()))
    if end is not None and end.device.type == "cpu":
        high = min(high, int(end[rows[0] : rows[1]].max()))
    return low, high


def _write_keys(keys: Tensor, scores: Tensor, hidden: Tensor | None, tile0: int) -> None:
    """Write the sortable keys of a tile of scores, which are used up."""
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    unfit = (scores > -torch.inf).logical_not_()
    scores += 0.0  # -0.0 ties with 0.0, its bits do not
    bits = scores.view(torch.int32)
    # negative floats order by falling magnitude bits: flip those
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys.copy_(bits)
    keys <<= 32
    newest = LAST_POSITION - tile0
    keys += torch.arange(newest, newest - keys.shape[1], -1, device=keys.device)
    keys.masked_fill_(unfit, NOTHING)


def _positions(best: Tensor) -> Tensor:
    """Return the positions in the keys, int32 ascending, -1 for nothing; the keys are used up."""
    positions = best.bitwise_not_().bitwise_and_(LAST_POSITION).to(torch.int32).sort(-1).values
    return positions.masked_fill_(positions == LAST_POSITION, -1)
