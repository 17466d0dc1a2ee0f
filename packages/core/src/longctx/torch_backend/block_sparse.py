"""Attention under a plan, in work that follows what the plan keeps.

The keys of a tile of queries are gathered and attended as one dense piece, many tiles at a time
and never more than a budget. Counts and stripes are read on the host, which synchronises a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from longctx.torch_backend._gathered import HeadTiles, groups, wide_dtype
from longctx.torch_backend._merge import merge_pair
from longctx.torch_backend.flash import flash_forward

__all__ = ["block_sparse_forward", "stripe_sparse_forward", "window_sparse_forward"]

# queries a tile under stripes: an isolated diagonal costs a tile as many keys as it has rows
STRIPE_TILE = 32


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the results where nothing is kept."""
    batch, q_len, heads, _ = q.shape
    lse = q.new_full((batch, heads, q_len), -torch.inf, dtype=wide_dtype(q))
    return q.new_zeros(batch, q_len, heads, v.shape[3]), lse


def _head_sets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    plan_heads: int,
    size: int,
    scale: float,
) -> Iterator[tuple[int, int, HeadTiles]]:
    """Yield (batch, plan head, tiles).

    Query heads are taken together where they share both the keys and the set: a KV head at a time
    unless the plan tells query heads apart.
    """
    if q.shape[1] == 0:
        return
    size = min(size, q.shape[1])
    sets = q.shape[2] if plan_heads == q.shape[2] else k.shape[2]
    split = (sets, q.shape[2] // sets)
    for b, s in product(range(q.shape[0]), range(sets)):
        kv = s * k.shape[2] // sets
        yield (
            b,
            s * plan_heads // sets,
            HeadTiles(
                torch.unflatten(q[b], 1, split)[:, s],
                k[b, :, kv],
                v[b, :, kv],
                torch.unflatten(out[b], 1, split)[:, s],
                torch.unflatten(lse[b], 0, split)[s].T,
                size=size,
                scale=scale,
            ),
        )


def block_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` over the kept key blocks of each query block."""
    out, lse = _empty(q, v)
    k_len = k.shape[1]
    if k_len == 0:
        return out, lse
    inside = torch.arange(block_k, device=q.device)
    widths = (counts.clamp(max=indices.shape[3]) * block_k).tolist()
    for b, h, tiles in _head_sets(
        q, k, v, out, lse, plan_heads=counts.shape[1], size=block_q, scale=scale
    ):
        for members, width in groups(widths[b][h], tiles.keys_at_once()):
            chosen = torch.tensor(members, device=q.device)
            blocks = indices[b, h, chosen, : width // block_k].long()
            slots = torch.arange(width // block_k, device=q.device)
            real = (slots < counts[b, h, chosen].unsqueeze(1)) & (blocks >= 0)
            keys = (blocks * block_k).unsqueeze(2) + inside
            rows = tiles.first + tiles.tokens(chosen)
            limit = rows[:, -1:].clamp(max=k_len - 1) if causal else rows.new_tensor(k_len - 1)
            keys = keys.where(real.unsqueeze(2) & (keys <= limit.unsqueeze(-1)), -1).flatten(1)

            def keep(piece: slice, keys: Tensor = keys, rows: Tensor = rows) -> Tensor:
                columns = keys[:, piece].unsqueeze(1)
                return columns <= rows.unsqueeze(2) if causal else columns >= 0

            tiles.attend(chosen, keys, keep)
    return out, lse


def stripe_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vertical: Tensor,
    vertical_counts: Tensor,
    slash: Tensor,
    slash_counts: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` over the union of columns and diagonals, each pair once."""
    out, lse = _empty(q, v)
    if k.shape[1] == 0:
        return out, lse
    columns = _members(vertical, vertical_counts, k.shape[1])
    distances = _members(slash, slash_counts, k.shape[1])
    for b, h, tiles in _head_sets(
        q,
        k,
        v,
        out,
        lse,
        plan_heads=vertical.shape[1],
        size=STRIPE_TILE,
        scale=scale,
    ):
        _attend_stripes(tiles, columns[b, h], distances[b, h])
    return out, lse


def window_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_windows: Tensor | None,
    *,
    window: int,
    sink_tokens: int,
    last_queries: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``: a sliding window, merged with the sink tokens outside it."""
    out, lse = _empty(q, v)
    k_len, q_heads, kv_heads = k.shape[1], q.shape[2], k.shape[2]
    if k_len == 0:
        return out, lse
    rows = max(q.shape[1] - last_queries, 0)
    if rows < q.shape[1]:
        out[:, rows:], lse[..., rows:] = _flash(q[:, rows:], k, v, scale)
    limit = k_len - (q.shape[1] - rows)
    if rows == 0 or limit <= 0:
        return out, lse
    q, k, v = q[:, :rows], k[:, :limit], v[:, :limit]
    if head_windows is None:
        out[:, :rows], lse[..., :rows] = _window_with_sinks(q, k, v, window, sink_tokens, scale)
        return out, lse
    group = q_heads // kv_heads
    for head, reach in enumerate(head_windows.tolist()):
        one, kv = slice(head, head + 1), slice(head // group, head // group + 1)
        out[:, :rows, one], lse[:, one, :rows] = _window_with_sinks(
            q[:, :, one], k[:, :, kv], v[:, :, kv], reach, sink_tokens, scale
        )
    return out, lse


def _window_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, window: int, sink_tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend ``p - j <= window``, and ``j < sink_tokens`` where the window does not reach it."""
    out, lse = _flash(q, k, v, scale, window=window)
    sinks, first = min(sink_tokens, k.shape[1]), k.shape[1] - q.shape[1]
    # the query at p sees the sinks j < p - window besides: none, then more and more, then all
    some = min(max(window + 1 - first, 0), q.shape[1])
    every = min(max(window + sinks - first, some), q.shape[1])
    if sinks == 0 or some == q.shape[1]:
        return out, lse
    for start, stop, keys in ((some, every, first + every - 1 - window), (every, None, sinks)):
        rows = slice(start, stop)
        if q[:, rows].shape[1]:
            part = _flash(q[:, rows], k[:, :keys], v[:, :keys], scale, causal=stop is not None)
            out[:, rows], lse[..., rows] = merge_pair((out[:, rows], lse[..., rows]), part)
    return out, lse


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    return flash_forward(
        q,
        k,
        v,
        causal=causal,
        window_left=window,
        window_right=None,
        softcap=0.0,
        sinks=None,
        scale=scale,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )


def _members(indices: Tensor, counts: Tensor, size: int) -> Tensor:
    """Return membership ``[B, H, size]`` of padded ``indices [B, H, C]``."""
    slots = torch.arange(indices.shape[2], device=indices.device)
    real = (slots < counts.unsqueeze(2)) & (indices >= 0) & (indices < size)
    member = torch.zeros(*indices.shape[:2], size + 1, dtype=torch.bool, device=indices.device)
    return member.scatter_(2, indices.long().where(real, size), True)[..., :size]


def _attend_stripes(tiles: HeadTiles, is_column: Tensor, is_distance: Tensor) -> None:
    """Attend key columns and diagonals, both given as membership ``[k_len]``.

    The diagonals reach the same keys in every tile, counted from its first row: key ``p0 - d`` for
    each ``d`` within ``size`` below a kept distance. Columns among these are merged by the mask,
    the others are attended after them.
    """
    size, k_len = tiles.size, is_column.shape[0]
    padded = torch.nn.functional.pad(is_distance, (size - 1, size - 1))
    # reached[d + size - 1]: some row i of a tile keeps the distance i + d
    reached = padded.unfold(0, size, 1).any(1)
    offsets = reached.nonzero().squeeze(1) - (size - 1)
    columns = is_column.nonzero().squeeze(1)
    rows = torch.arange(size, device=offsets.device).unsqueeze(1)
    on_diagonal = padded[rows + offsets + size - 1]
    starts = tiles.first + torch.arange(tiles.count, device=offsets.device) * size
    near = torch.searchsorted(offsets, starts, right=True)
    far = torch.searchsorted(columns, starts + size - 1, right=True)
    for members, _ in groups((near + far).tolist(), tiles.keys_at_once()):
        chosen = torch.tensor(members, device=offsets.device)
        start = starts[chosen].unsqueeze(1)
        n_near, n_far = int(near[chosen].max()), int(far[chosen].max())
        keys = start - offsets[:n_near]
        keys = keys.where((keys >= 0) & (keys < k_len), -1)
        others = columns[:n_far].expand(len(members), -1)
        reach = (start - others).clamp(min=-size) + size - 1
        seen = (reach < 0) | reached[reach.clamp(min=0, max=len(reached) - 1)]
        keys = torch.cat([keys, others.masked_fill(seen, -1)], 1)
        positions = (tiles.first + tiles.tokens(chosen)).unsqueeze(2)

        def keep(
            piece: slice, keys: Tensor = keys, n_near: int = n_near, positions: Tensor = positions
        ) -> Tensor:
            part = keys[:, piece]
            pairs = is_column[part.clamp(min=0)].unsqueeze(1) & (part.unsqueeze(1) <= positions)
            diagonal = on_diagonal[:, piece.start : min(piece.stop, n_near)]
            pairs[..., : diagonal.shape[1]] |= diagonal
            return pairs

        tiles.attend(chosen, keys, keep)
