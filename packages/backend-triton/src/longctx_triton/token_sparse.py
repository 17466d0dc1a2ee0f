"""Token Sparse Attention (arXiv 2602.03216): score, select, attend; the primitives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longctx_triton.kernels.select_mass import head_mean_kernel, keep_count_kernel
from longctx_triton.kernels.select_rows import CHUNK, choose_rows
from longctx_triton.kernels.token_attention import token_set_attention_kernel
from longctx_triton.kernels.token_scores import (
    merge_statistics_kernel,
    pool_kernel,
    share_kernel,
    statistics_kernel,
)
from longctx_triton.launch.device import SMALL_SHARED, device_of
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import attention_tiles, signed_scale, token_tiles

__all__ = ["select_tokens_forward", "token_scores_forward", "token_sparse_forward"]


def token_scores_forward(q_recent: Tensor, k: Tensor, *, pool: int, scale: float) -> Tensor:
    """Return ``[B, Hq, Sk - W]``: mean causal softmax of the last queries, pooled over keys."""
    batch, window, heads, head_dim = q_recent.shape
    k_len, kv_heads = k.shape[1], k.shape[2]
    group, prefix = heads // kv_heads, k_len - window
    device = q_recent.device
    shares = torch.empty(batch, heads, prefix, dtype=torch.float32, device=device)
    if shares.numel() == 0:
        return shares
    gpu = device_of(device)
    rows = attention_tiles(head_dim, head_dim, gpu.arch, window * group)
    columns = attention_tiles(head_dim, head_dim, gpu.arch, 64)
    units = batch * kv_heads
    row_tiles = -(-window * group // rows.queries)
    key_tiles = -(-k_len // rows.keys)
    wanted = max(1, min(-(-2 * gpu.processors // (units * row_tiles)), key_tiles // 4))
    span = -(-key_tiles // wanted) * rows.keys
    parts = -(-k_len // span)
    sums = torch.empty(batch, heads, parts, window, dtype=torch.float32, device=device)
    totals = torch.empty(batch, heads, window, dtype=torch.float32, device=device)
    scale_log2, q_factor = signed_scale(scale)
    strides = (*q_recent.stride()[:3], *k.stride()[:3])
    shape = {"GROUP": group, "D": head_dim, "BLOCK_D": padded(head_dim)}
    key_block = 32 if gpu.interpreted else 64 if gpu.arch in SMALL_SHARED else 128
    launch(
        statistics_kernel, (units * row_tiles, parts),
        q_recent, k, sums, *strides, window, k_len, units, kv_heads, span,
        scale_log2, q_factor, **shape, BM=rows.queries, BN=rows.keys,
        num_warps=rows.warps, num_stages=rows.stages,
    )  # fmt: skip
    launch(merge_statistics_kernel, (batch * heads,), sums, totals, window, parts, BLOCK_W=128)
    launch(
        share_kernel, (units * -(-prefix // key_block),),
        q_recent, k, totals, shares, *strides, window, prefix, units, kv_heads,
        scale_log2, q_factor, **shape, BW=min(64, padded(window)), BN=key_block,
        num_warps=4, num_stages=columns.stages,
    )  # fmt: skip
    if pool == 1:
        return shares
    scores = torch.empty_like(shares)
    launch(
        pool_kernel, (batch * heads, -(-prefix // CHUNK)),
        shares, scores, prefix, POOL=pool, BLOCK=CHUNK,
    )  # fmt: skip
    return scores


def select_tokens_forward(
    scores: Tensor, *, drop_mass: float, min_tokens: int, recent: int
) -> tuple[Tensor, Tensor]:
    """Return ``(indices [B, Hx, L + recent], counts [B, Hx])``; nothing is read on the host."""
    batch, heads, length = scores.shape
    device, capacity = scores.device, length + recent
    if drop_mass == 0 or length == 0:
        tokens = torch.arange(capacity, dtype=torch.int32, device=device)
        counts = torch.full((batch, heads), capacity, dtype=torch.int32, device=device)
        return tokens.expand(batch, heads, capacity).contiguous(), counts
    indices = torch.empty(batch, heads, capacity, dtype=torch.int32, device=device)
    counts = torch.empty(batch, heads, dtype=torch.int32, device=device)
    chunks = -(-length // CHUNK)
    means = torch.empty(batch, length, dtype=torch.float64, device=device)
    sums = torch.empty(batch, chunks, dtype=torch.float64, device=device)
    keep = torch.empty(batch, dtype=torch.int32, device=device)
    launch(
        head_mean_kernel, (chunks, batch),
        scores, means, sums, *scores.stride()[:2], length, heads, BLOCK=CHUNK,
    )  # fmt: skip
    launch(
        keep_count_kernel, (batch,),
        means, sums, keep, length, chunks, math.ceil(drop_mass * 2**52), min_tokens,
        BLOCK=4096, num_warps=16,
    )  # fmt: skip
    choose_rows(scores, keep, 0, indices, counts, recent)
    return indices, counts


def token_sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``: gather, attend and scatter in one kernel, unselected rows 0."""
    batch, q_len, heads, head_dim = q.shape
    value_dim = v.shape[3]
    out = torch.zeros(batch, q_len, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, q_len), -torch.inf, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or indices.numel() == 0:
        return out, lse
    tiles = token_tiles(head_dim, value_dim, device_of(q.device).arch, indices.shape[2])
    scale_log2, q_factor = signed_scale(scale)
    slot_tiles = -(-indices.shape[2] // tiles.queries)
    launch(
        token_set_attention_kernel, (batch * heads * slot_tiles,),
        q, k, v, out, lse, indices, counts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *indices.stride()[:2], counts.stride(0),
        q_len, k.shape[1], batch * heads, heads, heads // k.shape[2],
        heads // indices.shape[1], indices.shape[2], scale_log2, q_factor,
        D=head_dim, DV=value_dim, BLOCK_D=padded(head_dim), BLOCK_DV=padded(value_dim),
        SIGNED=q_factor != 1.0,
        BM=tiles.queries, BN=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, lse
