"""Launching the indexer over some rows of some batch entries."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from longctx_triton.kernels.index_scores import index_score_kernel
from longctx_triton.launch.device import device_of
from longctx_triton.launch.dsa_tiles import index_tiles
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.sizes import padded

__all__ = ["bounds_or", "score_rows"]

FP8 = torch.float8_e4m3fn
SPAN_TILES = 32
"""Key tiles that a program of the indexer takes at most, where there are rows enough."""


def bounds_or(
    unused: Tensor, key_start: Tensor | None, key_end: Tensor | None
) -> tuple[bool, Tensor, Tensor]:
    """Return whether the key ranges are bounded, and the bounds, or what a kernel never reads."""
    if key_start is None or key_end is None:
        return False, unused, unused
    return True, key_start, key_end


def score_rows(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    out: Tensor,
    *,
    causal: bool,
    batches: tuple[int, int],
    rows: tuple[int, int],
    width: int,
    stride: int,
    fill: bool,
) -> None:
    """Score keys ``[0, width)`` for the query rows ``rows`` of the batch entries ``batches``.

    ``out`` is fp32, laid out as ``[batches, rows, stride]``. With ``fill`` every cell is written,
    -inf where a key is not seen; without it, cells that are not seen may stay as they are.

    fp8 inputs are multiplied in fp8 on sm_89 and later and widened to fp16, exactly, elsewhere.
    Hopper's fp8 products add up with about 14 bits; ``LONGCTX_TRITON_INDEXER=fp16`` widens there,
    too, at half the rate.
    """
    q_len, heads, dim = q.shape[1:]
    k_len = k.shape[1]
    device = device_of(q.device)
    arch = device.arch
    unpack = q.dtype == FP8 and (
        arch < (8, 9) or os.environ.get("LONGCTX_TRITON_INDEXER") == "fp16"
    )
    if unpack:
        q, k = q.view(torch.uint8), k.view(torch.uint8)
    tiles = index_tiles(heads, rows[1] - rows[0], arch)
    row_tiles = -(-(rows[1] - rows[0]) // tiles.queries)
    key_tiles = -(-width // tiles.keys)
    n_batches = batches[1] - batches[0]
    spans = max(-(-4 * device.processors // (row_tiles * n_batches)), -(-key_tiles // SPAN_TILES))
    span = -(-key_tiles // min(spans, key_tiles)) * tiles.keys
    ranged, start, end = bounds_or(out, key_start, key_end)
    launch(
        index_score_kernel, (row_tiles, -(-width // span), n_batches),
        q, k, weights, weights if k_scale is None else k_scale, start, end, out,
        *q.stride()[:3], *k.stride()[:2], *weights.stride()[:2],
        0 if k_scale is None else k_scale.stride(0), start.stride(0), end.stride(0),
        batches[0], rows[0], rows[1], k_len - q_len, k_len, width, stride, span,
        H=heads, BLOCK_H=tiles.block_heads, D=dim, BLOCK_D=padded(dim, 32),
        BT=tiles.queries, BN=tiles.keys, CAUSAL=causal, RANGE=ranged,
        SCALE=k_scale is not None, UNPACK=unpack, FILL=fill,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
