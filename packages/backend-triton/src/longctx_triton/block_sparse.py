"""Attention under a block, stripe or window plan: the primitives, which prepare and launch."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx_triton.kernels.block_list import block_attention_kernel
from longctx_triton.kernels.key_range import range_attention_kernel
from longctx_triton.kernels.stripes import (
    scatter_stripes_kernel,
    stripe_attention_kernel,
    stripe_index_kernel,
)
from longctx_triton.launch.device import device_of
from longctx_triton.launch.key_range import range_plan
from longctx_triton.launch.key_walk_hopper import block_list_forward, key_range_forward
from longctx_triton.launch.outputs import attention_outputs
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import (
    block_tiles,
    signed_scale,
    stripe_tile,
)
from longctx_triton.launch.stripe_walk_hopper import stripe_walk_forward

__all__ = ["block_sparse_forward", "stripe_sparse_forward", "window_sparse_forward"]

SCATTER_BLOCK = 1024
"""Stripes that a program of the scatter takes."""

INDEX_ELEMENTS = 4096
"""Keys that the stripe index takes at a time."""


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
    """Return ``(out, lse)`` over the kept key blocks of each query block, of any block sizes."""
    batch, q_len, heads, head_dim = q.shape
    value_dim = v.shape[3]
    out, lse = attention_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    device = device_of(q.device)
    if device.runs_gluon and block_list_forward(
        device, q, k, v, out, lse, counts, indices,
        block_q=block_q, block_k=block_k, causal=causal, scale=scale,
    ):  # fmt: skip
        return out, lse
    tiles = block_tiles(head_dim, value_dim, device.arch, min(block_q, q_len))
    queries, keys = tiles.queries, tiles.keys
    # a key block that is no multiple of the tile's is walked in smaller tiles, or gathered
    while block_k % keys and keys > 64:
        keys //= 2
    tiles_a_block = -(-block_q // queries)
    scale_log2, q_factor = signed_scale(scale)
    grid = (batch * heads * tiles_a_block * counts.shape[2],)
    launch(
        block_attention_kernel, grid,
        q, k, v, out, lse, counts, indices,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *counts.stride()[:2], *indices.stride()[:3],
        q_len, k.shape[1], batch * heads, heads, heads // k.shape[2],
        heads // counts.shape[1], indices.shape[3], tiles_a_block, scale_log2, q_factor,
        D=head_dim, DV=value_dim, BLOCK_D=padded(head_dim), BLOCK_DV=padded(value_dim),
        SIGNED=q_factor != 1.0,
        BM=queries, BN=keys, BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=causal,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
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
    """Return ``(out, lse)`` over ``key < sink_tokens or query - key <= window``; causal."""
    out, lse = attention_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    device = device_of(q.device)
    if device.runs_gluon and key_range_forward(
        device, q, k, v, out, lse, scale=scale, window=window, anchor=sink_tokens,
        last_queries=last_queries, head_windows=head_windows,
    ):  # fmt: skip
        return out, lse
    plan = range_plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), scale, device,
        window=window, anchor=sink_tokens, last_queries=last_queries,
        head_windows=head_windows is not None,
    )  # fmt: skip
    plan(range_attention_kernel, q, k, v, out, lse, lse if head_windows is None else head_windows)
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
    batch, q_len, heads, head_dim = q.shape
    k_len, value_dim = k.shape[1], v.shape[3]
    out, lse = attention_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    device = device_of(q.device)
    if device.runs_gluon and stripe_walk_forward(
        device, q, k, v, out, lse, vertical, vertical_counts, slash, slash_counts, scale=scale
    ):
        return out, lse
    tile = stripe_tile(head_dim, value_dim, device.arch)
    sets_a_batch, n_vertical, n_slash = vertical.shape[1], vertical.shape[2], slash.shape[2]
    sets = batch * sets_a_batch
    groups = -(-k_len // tile.queries) + 1
    s_list = n_vertical + 4 * groups
    members = torch.zeros(sets, 2, k_len, dtype=torch.uint8, device=q.device)
    lists = torch.empty(sets, s_list, dtype=torch.int32, device=q.device)
    scale_log2, q_factor = signed_scale(scale)
    row_tiles = -(-q_len // tile.queries)
    chunks = max(1, -(-max(n_vertical, n_slash) // SCATTER_BLOCK))
    launch(
        scatter_stripes_kernel, (sets, chunks),
        members, vertical, vertical_counts, slash, slash_counts,
        *vertical.stride()[:2], vertical_counts.stride(0),
        *slash.stride()[:2], slash_counts.stride(0),
        sets_a_batch, k_len, n_vertical, n_slash, BLOCK=SCATTER_BLOCK, num_warps=4,
    )  # fmt: skip
    launch(
        stripe_index_kernel, (sets,),
        members, lists, k_len, groups, n_vertical, s_list,
        TILE=tile.queries, CHUNK=INDEX_ELEMENTS // tile.queries, num_warps=8,
    )  # fmt: skip
    launch(
        stripe_attention_kernel, (batch * heads * row_tiles,),
        q, k, v, out, lse, members, lists,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        q_len, k_len, batch * heads, heads, heads // k.shape[2], heads // sets_a_batch,
        groups, n_vertical, s_list, scale_log2, q_factor,
        D=head_dim, DV=value_dim, BLOCK_D=padded(head_dim), BLOCK_DV=padded(value_dim),
        SIGNED=q_factor != 1.0,
        TILE=tile.queries, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse
