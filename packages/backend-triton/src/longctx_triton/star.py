"""Star Attention (arXiv 2411.17116): the primitives of both phases, which prepare and launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx_triton.kernels.key_range import range_attention_kernel
from longctx_triton.kernels.merge_parts import merge_parts
from longctx_triton.kernels.star_query import star_query_kernel
from longctx_triton.launch.device import device_of
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import attention_tiles, signed_scale, star_tiles

__all__ = ["star_context_forward", "star_query_forward"]

LEAST_TILES = 4
"""Key tiles that are worth a part of their own."""


def star_context_forward(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, anchor_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of phase 1: two runs of key tiles, the anchor and the own block.

    Tiles of queries begin at the blocks' own starts, so that none spans two blocks.
    """
    batch, q_len, heads, head_dim = q.shape
    k_len, value_dim = k.shape[1], v.shape[3]
    out = torch.empty(batch, q_len, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    block_size = min(block_size, k_len)
    device = device_of(q.device)
    if device.runs_gluon:
        # Gluon is imported where it can run
        from longctx_triton.launch.key_walk_hopper import key_range_forward

        if key_range_forward(
            device, q, k, v, out, lse, scale=scale, anchor=anchor_size, block=block_size
        ):
            return out, lse
    tiles = star_tiles(head_dim, value_dim, device.arch, min(block_size, q_len))
    scale_log2, q_factor = signed_scale(scale)
    origin = (k_len - q_len) // block_size * block_size
    tiles_a_block = -(-block_size // tiles.queries)
    row_tiles = -(-(k_len - origin) // block_size) * tiles_a_block
    range_attention_kernel[(batch * heads * row_tiles,)](
        q, k, v, out, lse, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        q_len, k_len, batch * heads, heads, heads // k.shape[2],
        origin, block_size, tiles_a_block, min(anchor_size, block_size), 0, 0,
        scale_log2, q_factor,
        D=head_dim, DV=value_dim, BLOCK_D=padded(head_dim), BLOCK_DV=padded(value_dim),
        SIGNED=q_factor != 1.0,
        BM=tiles.queries, BN=tiles.keys, BY_BLOCK=True, HEAD_WINDOWS=False,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, lse


def star_query_forward(
    q: Tensor,
    shard_keys: Sequence[Tensor],
    shard_values: Sequence[Tensor],
    *,
    query_shard: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of phase 2, merged in fp32.

    Where the query rows alone fill the GPU, every shard goes on from the result of the one before;
    else a shard is cut into parts, and all parts are merged at the end.
    """
    batch, q_len, heads, _ = q.shape
    kv_heads, value_dim = shard_keys[0].shape[2], shard_values[0].shape[3]
    out = torch.empty(batch, q_len, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    device = device_of(q.device)
    rows = q_len * (heads // kv_heads)
    tiles = attention_tiles(q.shape[3], value_dim, device.arch, rows)
    units = batch * kv_heads * -(-rows // tiles.queries)
    most_parts = -(-2 * device.processors // units)
    shards = [n for n, keys in enumerate(shard_keys) if keys.shape[1]]
    if units >= device.processors or (len(shards) == 1 and most_parts == 1):
        _chain(q, shard_keys, shard_values, shards, query_shard, scale, out, lse)
        return out, lse
    parts, spans = [], []
    for n in shards:
        key_tiles = -(-shard_keys[n].shape[1] // tiles.keys)
        wanted = max(1, min(most_parts, key_tiles // LEAST_TILES))
        span = -(-key_tiles // wanted) * tiles.keys
        spans.append(span)
        parts.append(-(-shard_keys[n].shape[1] // span))
    total = sum(parts)
    part_out = torch.empty(total, *out.shape, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(total, *lse.shape, dtype=torch.float32, device=q.device)
    done = 0
    for n, n_parts, span in zip(shards, parts, spans, strict=True):
        _attend_shard(
            q, shard_keys[n], shard_values[n], None, (part_out[done:], part_lse[done:]),
            n_parts, span, n == query_shard, scale,
        )  # fmt: skip
        done += n_parts
    merge_parts(part_out, part_lse, None, out, lse)
    return out, lse


def _chain(
    q: Tensor,
    shard_keys: Sequence[Tensor],
    shard_values: Sequence[Tensor],
    shards: list[int],
    query_shard: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    wide = torch.empty_like(out, dtype=torch.float32) if len(shards) > 1 else out
    past = None
    for n in shards:
        target = out if n == shards[-1] else wide
        _attend_shard(
            q, shard_keys[n], shard_values[n], past, (target, lse), 1, shard_keys[n].shape[1],
            n == query_shard, scale,
        )  # fmt: skip
        past = (wide, lse)


def _attend_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor] | None,
    result: tuple[Tensor, Tensor],
    parts: int,
    span: int,
    causal: bool,
    scale: float,
) -> None:
    """Attend one shard, in parts of ``span`` keys."""
    batch, q_len, heads, head_dim = q.shape
    k_len, kv_heads, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    tiles = attention_tiles(head_dim, value_dim, device_of(q.device).arch, q_len * group)
    scale_log2, q_factor = signed_scale(scale)
    launch(
        star_query_kernel, (batch * kv_heads * -(-q_len * group // tiles.queries), parts),
        q, k, v, *(result if past is None else past), *result,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        q_len, k_len, batch, batch * kv_heads, kv_heads, span, scale_log2, q_factor,
        GROUP=group, D=head_dim, DV=value_dim,
        BLOCK_D=padded(head_dim), BLOCK_DV=padded(value_dim), SIGNED=q_factor != 1.0,
        BM=tiles.queries, BN=tiles.keys, CAUSAL=causal, RESUME=past is not None,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
