"""Attention of a few new tokens over a KV cache in plain PyTorch, and exact merging.

A group's query heads and the new tokens are rows that share one KV head, so that the cache is read
once and never repeated. On a CPU lengths are known, and slices of the cache (or gathered pages)
go through the fused kernel in pieces; elsewhere nothing is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.torch_backend._decode_device import decode_on_device
from longctx.torch_backend._decode_host import decode_on_host
from longctx.torch_backend._decode_splits import decode_in_splits, splits_run
from longctx.torch_backend._merge import add_sinks_, merge_parts

__all__ = ["decode_forward", "merge_forward"]


def decode_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    window_left: int | None,
    softcap: float,
    sinks: Tensor | None,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `longctx.protocols.attention.DecodeAttention.decode_forward`.

    Lengths and page numbers are read on the host for CPU tensors. On other devices nothing is, and
    a call reads the cache's whole capacity, except in half precision on CUDA.
    """
    batch, q_len, heads, _ = q.shape
    kv_heads, value_dim = v_cache.shape[2:]
    if batch == 0:
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(0, q_len, heads, value_dim), q.new_empty(0, heads, q_len, dtype=wide)
    # [batch, group * q_len, kv_heads, head_dim]: the rows of each KV head
    rows = q.reshape(batch, q_len, kv_heads, -1, q.shape[3]).permute(0, 3, 1, 2, 4).flatten(1, 2)
    if k_cache.dtype == torch.float8_e4m3fn:
        rows = rows.float()
        if k_scale is not None:
            rows = rows * k_scale.view(batch, 1, kv_heads, 1)
    caches = (k_cache, v_cache, cache_seqlens, page_table)
    if q.device.type == "cpu":
        run = decode_on_host
    elif not softcap and splits_run(rows, k_cache, v_cache, page_table):
        run = decode_in_splits
    else:
        run = decode_on_device
    out, lse = run(rows, *caches, q_len=q_len, left=window_left, softcap=softcap, scale=scale)
    if v_scale is not None:
        out = out * v_scale.view(batch, 1, kv_heads, 1)
    out = out.view(batch, -1, q_len, kv_heads, value_dim).permute(0, 2, 3, 1, 4)
    # reshape() alone would keep the strides of one KV head's rows
    out = out.reshape(batch, q_len, heads, value_dim).contiguous()
    lse = lse.reshape(batch, heads, q_len).contiguous()
    if sinks is not None:
        lse = add_sinks_(out, lse, sinks)
    return out.to(q.dtype), lse


def merge_forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See `longctx.protocols.attention.DecodeAttention.merge_forward`."""
    out, lse = merge_parts(outs, lses.transpose(2, 3))
    return out, lse.transpose(1, 2).contiguous()
