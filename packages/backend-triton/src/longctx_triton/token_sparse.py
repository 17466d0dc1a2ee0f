"""Token Sparse Attention (arXiv 2602.03216): score, select, attend; the primitives."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx_triton.kernels.clear_rows import clear_rows_kernel
from longctx_triton.kernels.select_mass import head_mean_kernel, keep_count_kernel
from longctx_triton.kernels.select_rows import row_emit_kernel, row_threshold_kernel
from longctx_triton.kernels.token_attention import token_set_attention_kernel
from longctx_triton.kernels.token_scores import (
    merge_statistics_kernel,
    pool_kernel,
    share_kernel,
    statistics_kernel,
)
from longctx_triton.launch.clear_rows import COUNTER
from longctx_triton.launch.device import device_of
from longctx_triton.launch.outputs import attention_outputs
from longctx_triton.launch.scratch import scratch
from longctx_triton.launch.token_attention_hopper import token_attention_forward
from longctx_triton.launch.token_sparse import attend_plan, mass_plan, score_plan

__all__ = ["select_tokens_forward", "token_scores_forward", "token_sparse_forward"]


def token_scores_forward(q_recent: Tensor, k: Tensor, *, pool: int, scale: float) -> Tensor:
    """Return ``[B, Hq, Sk - W]``: mean causal softmax of the last queries, pooled over keys."""
    batch, window, heads, _ = q_recent.shape
    device = q_recent.device
    prefix = k.shape[1] - window
    scores = q_recent.new_empty(batch, heads, prefix, dtype=torch.float32)
    if batch * heads * prefix == 0:
        return scores
    plan = score_plan(
        q_recent.shape, q_recent.stride(), k.shape, k.stride(), pool, scale, device_of(device)
    )
    kernels = (statistics_kernel, merge_statistics_kernel, share_kernel, pool_kernel)
    steps = 4 if pool > 1 else 3
    plan.score(kernels[:steps], q_recent, k, *scratch(k, plan.memory), scores)
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
    indices = scores.new_empty(batch, heads, capacity, dtype=torch.int32)
    counts = scores.new_empty(batch, heads, dtype=torch.int32)
    plan = mass_plan(scores.shape, scores.stride(), drop_mass, min_tokens, recent)
    kernels = (head_mean_kernel, keep_count_kernel, row_threshold_kernel, row_emit_kernel)
    plan.choose(kernels, scores, *scratch(scores, plan.memory), indices, counts)
    return indices, counts


def token_sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``: gather, attend and scatter in one kernel, unselected rows 0."""
    out, lse = attention_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    if indices.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    device = device_of(q.device)
    if device.runs_gluon and token_attention_forward(
        device, q, k, v, out, lse, indices, counts, scale=scale
    ):
        return out, lse
    plan = attend_plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), indices.shape,
        indices.stride(), counts.stride(), scale, device,
    )  # fmt: skip
    kernels = (clear_rows_kernel, token_set_attention_kernel)
    plan(kernels, q, k, v, indices, counts, out, lse, *scratch(q, COUNTER))
    return out, lse
