"""Attention of a few new tokens over a KV cache on NVIDIA GPUs, and exact merging."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx_triton.kernels.decode import decode_kernel
from longctx_triton.kernels.merge import merge_kernel, merge_splits_kernel
from longctx_triton.launch.decode_plan import decode_plan
from longctx_triton.launch.device import device_of
from longctx_triton.launch.outputs import attention_outputs
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.workspace import workspace

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

    Lengths and page numbers are read on the device alone: the grid follows from the capacity, the
    shares of the keys from each sequence's own length, so that a captured graph may be replayed
    with other lengths.
    """
    out, lse = attention_outputs(q, v_cache)
    if q.shape[0] == 0:
        return out, lse
    pages, page_stride = None, 0
    if page_table is not None:
        page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
        pages, page_stride = page_table.shape[1], page_table.stride(0)
    plan = decode_plan(
        q.shape, q.stride(), k_cache.shape, k_cache.stride(), v_cache.shape, v_cache.stride(),
        k_cache.dtype, pages, page_stride, window_left, softcap, scale, device_of(q.device),
    )  # fmt: skip
    if plan.bits:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    inputs = (q, k_cache, v_cache, cache_seqlens, page_table, sinks, k_scale, v_scale)
    if not plan.parts:
        plan.attend(decode_kernel, *inputs, None, None, out, lse)
        return out, lse
    if plan.merge is None:
        counters, parts = workspace(plan.counters, plan.parts, q.device)
        plan.attend(decode_kernel, *inputs, parts, counters, out, lse)
    else:
        parts = torch.empty(plan.parts, dtype=torch.float32, device=q.device)
        plan.attend(decode_kernel, *inputs, parts, None, None, None)
        plan.merge(merge_splits_kernel, parts, cache_seqlens, sinks, out, lse)
    return out, lse


def merge_forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See `longctx.protocols.attention.DecodeAttention.merge_forward`."""
    parts, batch, q_len, heads, dim = outs.shape
    out = torch.empty(batch, q_len, heads, dim, dtype=outs.dtype, device=outs.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=outs.device)
    rows = batch * q_len * heads
    if rows == 0:
        return out, lse
    block_v = max(16, 1 << (dim - 1).bit_length())
    # 16 values a thread at 128 threads
    block_r = max(1, min(2048 // block_v, 1 << (rows - 1).bit_length()))
    launch(
        merge_kernel, (-(-rows // block_r),),
        outs, lses, out, lse, parts, rows, q_len, heads, *outs.stride()[:4], *lses.stride(),
        VALUE_DIM=dim, BLOCK_V=block_v, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip
    return out, lse
