"""Star Attention (arXiv 2411.17116): the primitives of both phases, which prepare and launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from longctx_triton.kernels.key_range import range_attention_kernel
from longctx_triton.kernels.merge_parts import merge_parts_kernel
from longctx_triton.kernels.star_query import star_query_kernel
from longctx_triton.launch.device import device_of
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.scratch import scratch
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import signed_scale, star_tiles
from longctx_triton.launch.star_query import StarQueryPlan, star_query_plan

__all__ = ["star_context_forward", "star_query_forward"]


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
        key_range_forward = _gluon()
        if key_range_forward(
            device, q, k, v, out, lse, scale=scale, anchor=anchor_size, block=block_size
        ):
            return out, lse
    tiles = star_tiles(head_dim, value_dim, device.arch, min(block_size, q_len))
    scale_log2, q_factor = signed_scale(scale)
    origin = (k_len - q_len) // block_size * block_size
    tiles_a_block = -(-block_size // tiles.queries)
    row_tiles = -(-(k_len - origin) // block_size) * tiles_a_block
    launch(
        range_attention_kernel, (batch * heads * row_tiles,),
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


@cache
def _gluon() -> Callable[..., bool]:
    """Return what runs Hopper's own kernel: Gluon is imported where it can run."""
    from longctx_triton.launch.key_walk_hopper import key_range_forward

    return key_range_forward


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
    value_dim = shard_values[0].shape[3]
    out = torch.empty(batch, q_len, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    plan = star_query_plan(
        q.shape, q.stride(), tuple([k.shape for k in shard_keys]),
        tuple([k.stride() for k in shard_keys]), tuple([v.stride() for v in shard_values]),
        value_dim, query_shard, scale, device_of(q.device),
    )  # fmt: skip
    if not plan.shards:
        return out.zero_(), lse.fill_(-torch.inf)
    if plan.merged is None:
        _chain(plan, q, shard_keys, shard_values, out, lse)
        return out, lse
    inputs = [t for shard in plan.shards for t in shard.inputs(shard_keys, shard_values)]
    kernels = (star_query_kernel,) * len(plan.shards) + (merge_parts_kernel,)
    plan.merged(kernels, q, *inputs, *scratch(q, plan.memory), out, lse)
    return out, lse


def _chain(
    plan: StarQueryPlan,
    q: Tensor,
    shard_keys: Sequence[Tensor],
    shard_values: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attend one shard after the other, each from the result of the one before."""
    wide = out
    if len(plan.shards) > 1:
        wide = torch.empty(out.shape, dtype=torch.float32, device=q.device)
    for shard in plan.shards:
        target = out if shard is plan.shards[-1] else wide
        past = target if shard is plan.shards[0] else wide
        shard.attend(
            star_query_kernel, q, *shard.inputs(shard_keys, shard_values), past, lse, target, lse
        )  # fmt: skip
