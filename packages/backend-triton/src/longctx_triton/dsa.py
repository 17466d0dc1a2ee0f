"""DeepSeek Sparse Attention: quantiser, indexer, exact top-k, attention; the primitives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_triton.kernels.index_scores_backward import (
    score_backward_keys_kernel,
    score_backward_queries_kernel,
)
from longctx_triton.kernels.merge_parts import merge_parts
from longctx_triton.kernels.quantize import quantize_kernel
from longctx_triton.kernels.topk_attention import list_attention_kernel
from longctx_triton.launch.device import device_of
from longctx_triton.launch.dsa_tiles import index_backward_tiles, list_tiles
from longctx_triton.launch.index_scores import bounds_or, score_rows
from longctx_triton.launch.index_topk import index_topk_forward
from longctx_triton.launch.mla_hopper import latent_forward, latent_takes
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import signed_scale

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
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if scales.numel() == 0:
        return values, scales
    sizes, strides = _row_axes(x)
    if len(sizes) > 3:
        x = x.contiguous()
        sizes, strides = [scales.numel()], [x.shape[-1]]
    while len(sizes) < 3:
        sizes.insert(0, 1)
        strides.insert(0, 0)
    dim, rows = x.shape[-1], scales.numel()
    block = padded(dim)
    tile = max(1, 4096 // block)
    hardware = device_of(x.device).arch >= (8, 9)
    launch(
        quantize_kernel, (-(-rows // tile),),
        x, values if hardware else values.view(torch.uint8), scales, *strides,
        rows, sizes[1], sizes[2], D=dim, BLOCK_D=block, BLOCK_R=tile,
        POWER=scale_format == "ue8m0", HARDWARE=hardware, num_warps=4,
    )  # fmt: skip
    return values, scales


def _row_axes(x: Tensor) -> tuple[list[int], list[int]]:
    """Return sizes and strides of the leading axes, those that follow each other merged."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides


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
    if scores.numel():
        score_rows(
            q, k, weights, k_scale, key_start, key_end, scores,
            causal=causal, batches=(0, batch), rows=(0, q_len), width=k_len, stride=k_len,
            fill=True,
        )  # fmt: skip
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
        score_backward_queries_kernel[grid](*inputs, dq, dweights, *strides, **shape)
    if dk.numel():
        grid = (-(-k_len // tiles.keys), batch)
        score_backward_keys_kernel[grid](*inputs, dk, *strides, **shape)
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
    batch, q_len, heads, dim = q.shape
    k_len, kv_heads, value_dim = k.shape[1], k.shape[2], v.shape[3]
    out = torch.empty(batch, q_len, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    device = device_of(q.device)
    if device.arch == (9, 0) and latent_takes(q, k, v, page_size, scale):
        latent_forward(
            q, k, indices, out, lse, scale=scale, sinks=sinks, processors=device.processors
        )
        return out, lse
    group = heads // kv_heads
    main = max(16, 1 << (dim.bit_length() - 1))
    one_row = k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and value_dim == main
    tiles = list_tiles(group, main, padded(value_dim), one_row, device.arch)
    head_tiles = -(-group // tiles.heads)
    programs = batch * q_len * kv_heads * head_tiles
    slots = indices.shape[3] * page_size
    list_blocks = max(1, -(-slots // tiles.keys))
    wanted = min(-(-2 * device.processors // programs), -(-list_blocks // 2))
    wanted = wanted if programs < device.processors else 1
    span = -(-list_blocks // wanted) * tiles.keys
    parts = max(1, -(-slots // span))
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = torch.empty(parts, *out.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=q.device)
    scale_log2, q_factor = signed_scale(scale)
    launch(
        list_attention_kernel, (programs, parts),
        q, k, v, indices, lse if sinks is None else sinks, part_out, part_lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *indices.stride()[:3],
        batch, q_len, k_len, kv_heads, head_tiles, indices.shape[2], slots, span,
        scale_log2, q_factor,
        GROUP=group, D=min(dim, main), MAIN=main, REST=max(dim - main, 0),
        BLOCK_REST=padded(max(dim - main, 1)), DV=value_dim, BLOCK_DV=padded(value_dim),
        BM=tiles.heads, BN=tiles.keys, PAGE=page_size, ONE_ROW=one_row,
        SINKS=sinks is not None and parts == 1,
        LOOK=min(1024, padded(indices.shape[3])),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if parts > 1:
        merge_parts(part_out, part_lse, sinks, out, lse)
    return out, lse
