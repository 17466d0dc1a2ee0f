"""Launch parameters of the sparse attention kernels, by head size and architecture."""

from __future__ import annotations

import math
from typing import NamedTuple

from longctx_triton.launch.device import SMALL_SHARED
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.tuning import tuned

__all__ = [
    "Tiles",
    "attention_tiles",
    "block_tiles",
    "signed_scale",
    "star_tiles",
    "stripe_tile",
    "token_tiles",
    "window_tiles",
]

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Tile sizes and launch parameters of one attention kernel.

    Attributes
    ----------
    queries, keys : int
        Rows and columns of a tile of scores.
    warps, stages : int
        Triton's ``num_warps`` and ``num_stages``.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def signed_scale(scale: float) -> tuple[float, float]:
    """Return ``(scale_log2, factor of the scores)``; ``scale_log2 > 0``, as the softmax wants it.

    A scale of 0 is in the factor, before scores are masked: 0 times -inf would be NaN.
    """
    if scale == 0:
        return 1.0, 0.0
    return abs(scale) * LOG2_E, math.copysign(1.0, scale)


def attention_tiles(
    head_dim: int, value_dim: int, arch: tuple[int, int], most_queries: int = 128
) -> Tiles:
    """Return the tiles for flash-like loops over contiguous or gathered keys.

    Parameters
    ----------
    head_dim, value_dim : int
    arch : (int, int)
        Compute capability; (0, 0) for Triton's interpreter.
    most_queries : int
        Query rows that a tile can use; fewer rows make smaller tiles.
    """
    wide = max(padded(head_dim), padded(value_dim))
    if arch == (0, 0):
        return Tiles(min(64, padded(most_queries)), 32, 4, 1)
    queries = min(128 if wide <= 128 or arch >= (9, 0) else 64, padded(most_queries))
    if arch >= (9, 0):
        keys = 128 if wide <= 128 and queries == 128 else 64
        stages = 2
    else:
        keys = 64 if wide <= 128 else 32
        stages = 2
    if arch in SMALL_SHARED:
        keys //= 2
    return Tiles(queries, keys, 8 if queries == 128 else 4, stages)


block_tiles = tuned("block_list", apart=("most_queries",))(attention_tiles)
"""`attention_tiles` of the kernel that walks lists of key blocks."""
window_tiles = tuned("key_range", apart=("most_queries",))(attention_tiles)
"""Of the kernel that walks ranges of keys, under a window."""
star_tiles = tuned("key_range_star", apart=("most_queries",))(attention_tiles)
"""Of the same kernel, in star attention's first phase."""
token_tiles = tuned("token_attention", apart=("most_queries",))(attention_tiles)
"""Of the kernel that gathers chosen tokens."""


@tuned("stripes")
def stripe_tile(head_dim: int, value_dim: int, arch: tuple[int, int]) -> Tiles:
    """Return the square tile of stripes: an isolated diagonal costs its tile two of them."""
    if arch == (0, 0):
        return Tiles(32, 32, 4, 1)
    small = arch >= (9, 0) or max(padded(head_dim), padded(value_dim)) <= 128
    size = 64 if small else 32
    return Tiles(size, size, 4, 2)
