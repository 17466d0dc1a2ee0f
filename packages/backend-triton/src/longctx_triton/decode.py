"""Attention of a few new tokens over a KV cache on NVIDIA GPUs, and exact merging."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longctx_triton.kernels.decode import decode_kernel
from longctx_triton.kernels.merge import merge_kernel, merge_splits_kernel
from longctx_triton.launch.decode_splits import split_keys
from longctx_triton.launch.device import Device, device_of
from longctx_triton.launch.tuning import tuned

__all__ = ["decode_forward", "merge_forward"]

FP8 = torch.float8_e4m3fn
FAR = 1 << 30
"""A window so wide that no key is outside; the kernels count in 32 bits."""
TILE_BYTES = 16 << 10
"""Bytes of one key tile: two stages of keys and values in flight saturate a multiprocessor."""


class _Tiles(NamedTuple):
    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int


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
    batch, q_len, heads, head_dim = q.shape
    kv_heads, value_dim = v_cache.shape[2:]
    out = torch.empty(batch, q_len, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    device = device_of(q.device)
    group = heads // kv_heads
    paged = page_table is not None
    tiles = _tiles(group * q_len, head_dim, value_dim, k_cache.dtype.itemsize, paged, device)
    fp8 = ""
    if k_cache.dtype == FP8:
        fp8 = "native" if device.arch >= (8, 9) else "bits"
        if fp8 == "bits":
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    page_size, capacity = 0, k_cache.shape[1]
    if page_table is not None:
        page_size, capacity = k_cache.shape[1], page_table.shape[1] * k_cache.shape[1]
        page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    reach = capacity
    if window_left is not None:
        window_left = min(window_left, FAR)
        # a window's first and last block may both be partly outside
        reach = min(capacity, window_left + q_len + tiles.block_n)
    row_blocks = triton.cdiv(group * q_len, tiles.block_m)
    units = batch * kv_heads * row_blocks
    splits, least_blocks = split_keys(units, triton.cdiv(reach, tiles.block_n), device.processors)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
    decode_kernel[(row_blocks * kv_heads, splits, batch)](
        q, k_cache, v_cache, cache_seqlens, page_table, sinks, k_scale, v_scale,
        part_out, part_lse,
        scale, softcap, window_left or 0, q_len, group, kv_heads, splits, least_blocks, batch,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        0 if page_table is None else page_table.stride(0),
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=tiles.block_d, BLOCK_V=tiles.block_v,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, PAGE_SIZE=page_size, FP8=fp8,
        HAS_WINDOW=window_left is not None, HAS_SOFTCAP=softcap > 0, PARTIAL=splits > 1,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if splits > 1:
        merge_splits_kernel[(heads * q_len, batch)](
            part_out, part_lse, cache_seqlens, sinks, out, lse,
            window_left or 0, q_len, heads, splits, least_blocks, batch,
            VALUE_DIM=value_dim, BLOCK_V=tiles.block_v, BLOCK_N=tiles.block_n,
            BLOCK_S=max(2, min(16, triton.next_power_of_2(splits))),
            HAS_WINDOW=window_left is not None, num_warps=4,
        )  # fmt: skip
    return out, lse


def merge_forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See `longctx.protocols.attention.DecodeAttention.merge_forward`."""
    parts, batch, q_len, heads, dim = outs.shape
    out = torch.empty(batch, q_len, heads, dim, dtype=outs.dtype, device=outs.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=outs.device)
    rows = batch * q_len * heads
    if rows == 0:
        return out, lse
    block_v = max(16, triton.next_power_of_2(dim))
    # 16 values a thread at 128 threads
    block_r = max(1, min(2048 // block_v, triton.next_power_of_2(rows)))
    merge_kernel[(triton.cdiv(rows, block_r),)](
        outs, lses, out, lse, parts, rows, q_len, heads, *outs.stride()[:4], *lses.stride(),
        VALUE_DIM=dim, BLOCK_V=block_v, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip
    return out, lse


@tuned("decode", apart=("rows",))
def _tiles(
    rows: int, head_dim: int, value_dim: int, itemsize: int, paged: bool, device: Device
) -> _Tiles:
    block_d, block_v = (max(16, triton.next_power_of_2(d)) for d in (head_dim, value_dim))
    widest = max(block_d, block_v)
    most = 128 if widest <= 128 else 64
    block_m = min(most, max(16, triton.next_power_of_2(rows)))
    block_n = max(16, min(128 if block_m == 16 else 64, TILE_BYTES // (widest * itemsize)))
    if device.interpreted:  # the interpreter: several blocks for short caches too
        return _Tiles(16, 16, block_d, block_v, 1, 1)
    # two tiles in flight; behind page numbers, which are loaded ahead, Triton counts five stages
    stages = 5 if paged else 3
    if not device.large_shared:
        stages = 2
    num_warps = 8 if block_m == 128 or (block_m == 64 and widest == 256) else 4
    return _Tiles(block_m, block_n, block_d, block_v, num_warps, stages)
