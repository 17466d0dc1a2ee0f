"""DeepSeek Sparse Attention: quantiser, indexer, exact top-k, attention; the primitives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_triton.kernels.index_scores import index_score_kernel
from longctx_triton.kernels.index_scores_backward import (
    score_backward_keys_kernel,
    score_backward_queries_kernel,
)
from longctx_triton.kernels.merge_parts import merge_parts_kernel
from longctx_triton.kernels.quantize import quantize_kernel
from longctx_triton.kernels.topk_attention import list_attention_kernel
from longctx_triton.launch.device import device_of
from longctx_triton.launch.dsa_tiles import index_backward_tiles
from longctx_triton.launch.index_scores import bounds_or, layout_of, score_plan, unpacked
from longctx_triton.launch.index_topk import index_topk_forward
from longctx_triton.launch.mla_hopper import LATENT, latent_forward
from longctx_triton.launch.outputs import attention_outputs
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.quantize import quantize_plan
from longctx_triton.launch.scratch import scratch
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.topk_attention import list_plan

__all__ = [
    "index_scores_backward",
    "index_scores_forward",
    "index_topk_forward",
    "quantize_forward",
    "topk_attention_forward",
]


def quantize_forward(x: Tensor, *, scale_format: str) -> tuple[Tensor, Tensor]:
    """Return ``(x8 e4m3 [..., D], scale fp32 [...])``, one scale a row of the last axis.

    Rows are read where they stand; only layouts that need more than three strides are copied.
    """
    plan = quantize_plan(x.shape, x.stride(), scale_format == "ue8m0", device_of(x.device))
    # sizes apart: a tuple of them takes the host a microsecond longer
    values = torch.empty(*x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if plan.launch is not None:
        plan.launch(
            quantize_kernel, x.contiguous() if plan.copied else x,
            values if plan.hardware else values.view(torch.uint8), scales,
        )  # fmt: skip
    return values, scales


def index_scores_forward(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None,
    causal: bool,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> Tensor:
    """Return ``I [B, Sq, Sk]`` fp32, -inf at the pairs that are not seen."""
    batch, q_len, k_len = q.shape[0], q.shape[1], k.shape[1]
    scores = torch.empty(batch, q_len, k_len, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    device = device_of(q.device)
    unpack = unpacked(q, device.arch)
    plan = score_plan(
        layout_of(q, k, weights, k_scale, key_start, key_end), device, causal=causal,
        unpack=unpack, batches=(0, batch), rows=(0, q_len), width=k_len, stride=k_len, fill=True,
    )  # fmt: skip
    if unpack:
        q, k = q.view(torch.uint8), k.view(torch.uint8)
    _, start, end = bounds_or(scores, key_start, key_end)
    factors = weights if k_scale is None else k_scale
    plan(index_score_kernel, q, k, weights, factors, start, end, scores)
    return scores


def index_scores_backward(
    dscores: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    causal: bool,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dq, dk, dweights)``; every sum has a fixed order."""
    batch, q_len, heads, dim = q.shape
    k_len = k.shape[1]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=q.device)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=q.device)
    tiles = index_backward_tiles(heads, dim, device_of(q.device).arch)
    ranged, start, end = bounds_or(dscores, key_start, key_end)
    inputs = (dscores, q, k, weights, start, end)
    strides = (
        *q.stride()[:3], *k.stride()[:2], *weights.stride()[:2],
        start.stride(0), end.stride(0), q_len, k_len,
    )  # fmt: skip
    shape: dict[str, Any] = {
        "H": heads, "BLOCK_H": tiles.block_heads, "D": dim, "BLOCK_D": padded(dim),
        "BT": tiles.queries, "BN": tiles.keys, "CAUSAL": causal, "RANGE": ranged,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    if dweights.numel():
        grid = (-(-q_len // tiles.queries), batch)
        launch(score_backward_queries_kernel, grid, *inputs, dq, dweights, *strides, **shape)
    if dk.numel():
        grid = (-(-k_len // tiles.keys), batch)
        launch(score_backward_keys_kernel, grid, *inputs, dk, *strides, **shape)
    return dq, dk, dweights


def topk_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    page_size: int,
    scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out [B, Sq, Hq, Dv], lse)`` over ``indices`` int32 ``[B, Sq, G, K]``.

    Few query rows (decode) are cut over their lists and merged in fp32.
    """
    out, lse = attention_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    device = device_of(q.device)
    if q.shape[3] == LATENT and device.arch == (9, 0) and latent_forward(
        q, k, v, out, lse, indices, page_size=page_size, scale=scale, sinks=sinks,
        processors=device.processors,
    ):  # fmt: skip
        return out, lse
    plan = list_plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(),
        k.data_ptr() == v.data_ptr(), indices.shape, indices.stride(), page_size, scale,
        sinks is not None, device,
    )  # fmt: skip
    inputs = (q, k, v, indices, lse if sinks is None else sinks)
    if plan.merged is None:
        plan.attend(list_attention_kernel, *inputs, out, lse)
        return out, lse
    kernels = (list_attention_kernel, merge_parts_kernel)
    plan.merged(kernels, *inputs, *scratch(q, plan.memory), out, lse)
    return out, lse
