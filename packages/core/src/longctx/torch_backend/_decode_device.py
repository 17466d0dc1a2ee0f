"""Decode without a word to the host: the cache's capacity in chunks, masked by device lengths."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from longctx.torch_backend._decode_piece import attend_keys, visible
from longctx.torch_backend._flash_tiles import BUDGET
from longctx.torch_backend._fp8 import widen
from longctx.torch_backend._merge import merge_pair

__all__ = ["decode_on_device"]


def decode_on_device(
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
    """Return ``(out [B, R, Hkv, Dv], lse [B, Hkv, R])``, wide, of ``rows [B, R, Hkv, D]``.

    Row ``r`` belongs to query ``r % q_len``. Work grows with the capacity, not with the lengths,
    which stay on the device.
    """
    batch, _, kv_heads, head_dim = rows.shape
    page_size = 1 if page_table is None else k_cache.shape[1]
    capacity = k_cache.shape[1] if page_table is None else page_table.shape[1] * page_size
    width = kv_heads * (head_dim + v_cache.shape[3] + 2 * rows.shape[1])
    step = max(1, BUDGET // (8 * batch * width * page_size)) * page_size
    parts = []
    for begin in range(0, capacity, step):
        end = min(begin + step, capacity)
        slots = torch.arange(begin, end, device=rows.device)
        if page_table is None:
            keys, values = k_cache[:, begin:end], v_cache[:, begin:end]
        else:
            used = slots[::page_size] < cache_seqlens.unsqueeze(1)
            pages = page_table[:, begin // page_size : end // page_size]
            pages = torch.where(used, pages, 0)  # numbers past the length may be anything
            keys, values = (t[pages].flatten(1, 2) for t in (k_cache, v_cache))
        if keys.dtype == torch.float8_e4m3fn:
            keys, values = widen(keys, rows.dtype), widen(values, rows.dtype)
        seen = visible(slots, cache_seqlens, q_len, left)
        parts.append(attend_keys(rows, keys, values, seen, softcap=softcap, scale=scale))
    return reduce(merge_pair, parts)
