"""Flash-Decoding on CUDA's packed attention kernel: splits of the cache as packed sequences.

The kernel takes the first key and the number of keys of each sequence from device memory. So a
split of a contiguous cache, or a page, is a sequence, and lengths need never come to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.torch_backend._cuda_flash import flash_kernel, flash_kernel_runs
from longctx.torch_backend._decode_piece import attend_keys, visible
from longctx.torch_backend._merge import merge_pair, merge_parts

__all__ = ["decode_in_splits", "splits_run"]

_BLOCKS = 264  # two for each multiprocessor of a large GPU
_LEAST_SPLIT = 256
_LEAST_PAGE = 16


def splits_run(rows: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor | None) -> bool:
    """Return whether the kernel takes the cache as it lies, without a copy."""
    fits = page_table is None or k_cache.shape[1] >= max(_LEAST_PAGE, rows.shape[1] // 2)
    return (
        fits
        and flash_kernel_runs(rows, v_cache)
        and k_cache.dtype == rows.dtype
        and rows.shape[3] == v_cache.shape[3]
        and rows.shape[3] % 8 == 0
        and all(t.stride(0) == t.shape[1] * t.stride(1) for t in (k_cache, v_cache))
    )


def decode_in_splits(
    rows: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    *,
    q_len: int,
    left: int | None,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(out [B, R, Hkv, Dv], lse [B, Hkv, R])``, fp32, of ``rows [B, R, Hkv, D]``.

    Keys that every query sees go through the kernel; the few that only some of several queries see
    (at most ``q_len - 1`` at either end) through matrix products. ``softcap`` is 0.
    """
    lengths = cache_seqlens.long().unsqueeze(1)
    first = lengths - q_len  # position of the first query
    begin, shared = (
        torch.zeros_like(first) if left is None else (position - left).clamp(min=0)
        for position in (first, lengths - 1)
    )
    result = _splits(rows, k_cache, v_cache, page_table, shared, first + 1, left, scale)
    if q_len == 1:
        return result
    step = torch.arange(q_len - 1, device=rows.device)
    slots = [first + 1 + step]
    hidden = [torch.zeros_like(slots[0], dtype=torch.bool)]
    if left is not None:
        slots.append(begin + step)
        hidden.append(slots[1] >= torch.minimum(shared, first + 1))
    where = torch.cat(slots, 1)
    seen = visible(where.unsqueeze(1), cache_seqlens, q_len, left)
    seen &= ~torch.cat(hidden, 1).unsqueeze(1)
    where = torch.minimum(where, lengths - 1)
    if page_table is None:
        lines = torch.arange(where.shape[0], device=where.device).unsqueeze(1)
        keys, values = k_cache[lines, where], v_cache[lines, where]
    else:
        size = k_cache.shape[1]
        pages = page_table.long().gather(1, where // size)
        keys, values = k_cache[pages, where % size], v_cache[pages, where % size]
    edges = attend_keys(rows, keys, values, seen, softcap=0.0, scale=scale)
    return merge_pair(result, edges)


def _splits(
    rows: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None,
    begin: Tensor,
    end: Tensor,
    left: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys ``[begin, end)`` (``[B, 1]``, on the device), without masks."""
    batch, row_count, kv_heads, head_dim = rows.shape
    if page_table is None:
        capacity = k_cache.shape[1] if left is None else min(k_cache.shape[1], left + 1)
        share = -(-capacity * batch * kv_heads // _BLOCKS)
        size = -(-max(share, _LEAST_SPLIT) // 128) * 128
        count = -(-capacity // size)
        slots = begin + torch.arange(count, device=rows.device) * size
        base = torch.arange(batch, device=rows.device).unsqueeze(1) * k_cache.shape[1]
        where = base + slots
    else:
        size = k_cache.shape[1]
        count = page_table.shape[1] if left is None else min(page_table.shape[1], left // size + 2)
        number = begin // size + torch.arange(count, device=rows.device)
        slots = number * size
        pages = page_table.long().gather(1, number.clamp(max=page_table.shape[1] - 1))
        where = pages * size + (begin - slots).clamp(min=0)
    used = torch.minimum(slots + size, end) - torch.maximum(slots, begin)
    used = used.clamp(min=0)
    # a split without keys starts at 0: its number may be that of no page at all
    starts = torch.where(used > 0, where, 0).flatten().int()
    starts = torch.cat([starts, starts.new_zeros(1)])
    ends = torch.arange(
        0,
        (batch * count + 1) * row_count,
        row_count,
        dtype=torch.int32,
        device=rows.device,
    )
    out, lse = flash_kernel(
        rows.unsqueeze(1).expand(-1, count, -1, -1, -1).reshape(1, -1, kv_heads, head_dim),
        k_cache.flatten(0, 1).unsqueeze(0),
        v_cache.flatten(0, 1).unsqueeze(0),
        left=None,
        right=None,
        scale=scale,
        cu_seqlens_q=ends,
        cu_seqlens_k=starts,
        used_k=used.flatten().int(),
        longest=(row_count, size),
    )
    outs = out.view(batch, count, row_count, kv_heads, -1).transpose(0, 1).to(lse.dtype)
    lses = lse.view(kv_heads, batch, count, row_count).permute(2, 1, 3, 0)
    merged, merged_lse = merge_parts(outs, lses)
    return merged, merged_lse.transpose(1, 2)
