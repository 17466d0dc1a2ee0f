"""What the indexer launches over some rows of some batch entries, from shapes alone."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.settings import is_set
from longctx_triton.launch.device import Device
from longctx_triton.launch.dsa_tiles import index_tiles
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import padded

__all__ = ["Layout", "bounds_or", "layout_of", "score_plan", "unpacked"]

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


def unpacked(q: Tensor, arch: tuple[int, int]) -> bool:
    """Return whether fp8 inputs are widened to fp16, exactly, in place of fp8 products.

    They are on GPUs before sm_89. Hopper's fp8 products add up with about 14 bits;
    ``LONGCTX_TRITON_INDEXER=fp16`` widens there, too, at half the rate.
    """
    return q.dtype == FP8 and (arch < (8, 9) or _widened_by_choice())


def _widened_by_choice() -> bool:
    name = "LONGCTX_TRITON_INDEXER"
    return is_set(name) and os.environ[name] == "fp16"


class Layout(NamedTuple):
    """What the indexer has to know of its inputs.

    Attributes
    ----------
    q_shape, q_strides : tuple of int
        Of ``q (batch, q_len, heads, dim)``.
    k_shape, k_strides : tuple of int
        Of ``k (batch, k_len, dim)``.
    weight_strides : tuple of int
    scale_stride : int or None
        From one batch entry of ``k_scale`` to the next; None without scales.
    bound_strides : (int, int) or None
        The same of ``key_start`` and ``key_end``; None where ranges are not bounded.
    """

    q_shape: tuple[int, ...]
    q_strides: tuple[int, ...]
    k_shape: tuple[int, ...]
    k_strides: tuple[int, ...]
    weight_strides: tuple[int, ...]
    scale_stride: int | None
    bound_strides: tuple[int, int] | None


def layout_of(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> Layout:
    """Return the layout of inputs."""
    bounds = None
    if key_start is not None and key_end is not None:
        bounds = (key_start.stride(0), key_end.stride(0))
    return Layout(
        q.shape, q.stride(), k.shape, k.stride(), weights.stride(),
        None if k_scale is None else k_scale.stride(0), bounds,
    )  # fmt: skip


@lru_cache(maxsize=2048)
def score_plan(
    layout: Layout,
    device: Device,
    *,
    causal: bool,
    unpack: bool,
    batches: tuple[int, int],
    rows: tuple[int, int],
    width: int,
    stride: int,
    fill: bool,
) -> Prepared:
    """Return the launch of ``index_score_kernel`` for some rows of some batch entries.

    Keys ``[0, width)`` are scored for the query rows ``rows`` of the entries ``batches``. The
    result is fp32, laid out as ``[batches, rows, stride]``. With ``fill`` every cell is written,
    -inf where a key is not seen; without it, cells that are not seen may stay as they are.
    """
    heads, dim = layout.q_shape[2:]
    shift = layout.k_shape[1] - layout.q_shape[1]
    tiles = index_tiles(heads, rows[1] - rows[0], device.arch)
    row_tiles = -(-(rows[1] - rows[0]) // tiles.queries)
    key_tiles = -(-width // tiles.keys)
    n_batches = batches[1] - batches[0]
    spans = max(-(-4 * device.processors // (row_tiles * n_batches)), -(-key_tiles // SPAN_TILES))
    span = -(-key_tiles // min(spans, key_tiles)) * tiles.keys
    return Prepared(
        (row_tiles, -(-width // span), n_batches),
        (
            *layout.q_strides[:3], *layout.k_strides[:2], *layout.weight_strides[:2],
            layout.scale_stride or 0, *(layout.bound_strides or (0, 0)),
            batches[0], rows[0], rows[1], shift, layout.k_shape[1], width, stride, span,
        ),
        {
            "H": heads, "BLOCK_H": tiles.block_heads, "D": dim, "BLOCK_D": padded(dim, 32),
            "BT": tiles.queries, "BN": tiles.keys, "CAUSAL": causal,
            "RANGE": layout.bound_strides is not None, "SCALE": layout.scale_stride is not None,
            "UNPACK": unpack, "FILL": fill,
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        },
    )  # fmt: skip
