"""Star Attention (arXiv 2411.17116): the primitives of both phases, which prepare and launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx_triton.kernels.key_range import range_attention_kernel
from longctx_triton.kernels.merge_parts import merge_parts_kernel
from longctx_triton.kernels.star_query import star_query_kernel
from longctx_triton.launch.device import device_of
from longctx_triton.launch.key_range import range_plan
from longctx_triton.launch.key_walk_hopper import key_range_forward
from longctx_triton.launch.outputs import attention_outputs
from longctx_triton.launch.scratch import scratch
from longctx_triton.launch.star_query import StarQueryPlan, star_query_plan

__all__ = ["star_context_forward", "star_query_forward"]


def star_context_forward(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, anchor_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of phase 1: two runs of key tiles, the anchor and the own block."""
    out, lse = attention_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    device = device_of(q.device)
    if device.runs_gluon and key_range_forward(
        device, q, k, v, out, lse, scale=scale, anchor=anchor_size, block=block_size
    ):
        return out, lse
    plan = range_plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), scale, device,
        anchor=anchor_size, block=block_size,
    )  # fmt: skip
    plan(range_attention_kernel, q, k, v, out, lse, lse)
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
    out, lse = attention_outputs(q, shard_values[0])
    if out.numel() == 0:
        return out, lse
    inputs: list[Tensor] = []
    layout: list[tuple[int, ...]] = []
    for k, v in zip(shard_keys, shard_values, strict=True):
        inputs += (k, v)
        layout += (k.shape, k.stride(), v.stride())
    plan = star_query_plan(
        q.shape, q.stride(), tuple(layout), out.shape[3], query_shard, scale, device_of(q.device)
    )
    if not plan.shards:
        return out.zero_(), lse.fill_(-torch.inf)
    if plan.merged is None:
        _chain(plan, q, shard_keys, shard_values, out, lse)
        return out, lse
    kernels = (star_query_kernel,) * len(plan.shards) + (merge_parts_kernel,)
    plan.merged(kernels, q, *inputs, *scratch(q, plan.memory), out, lse, None)
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
