"""Launch parameters of the sparse attention kernels, by head size and architecture."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Tiles",
    "architecture",
    "attention_tiles",
    "padded",
    "processors",
    "signed_scale",
    "stripe_tile",
]

SMALL_SHARED = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
"""Architectures with about 100 KiB of shared memory a block."""

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


@cache
def _capability(index: int) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return major, minor


def architecture(tensor: Tensor) -> tuple[int, int]:
    """Return the compute capability of the tensor's GPU; (0, 0) for Triton's interpreter."""
    return _capability(tensor.device.index) if tensor.is_cuda else (0, 0)


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(tensor: Tensor) -> int:
    """Return the number of multiprocessors of the tensor's GPU; 8 for Triton's interpreter."""
    return _processors(tensor.device.index) if tensor.is_cuda else 8


def padded(size: int, least: int = 16) -> int:
    """Return the next power of two, at least ``least``: the extent of a tile."""
    return max(least, 1 << (size - 1).bit_length())


def signed_scale(scale: float) -> tuple[float, float]:
    """Return ``(scale_log2, factor of q)`` with ``scale_log2 > 0``, as the softmax wants it.

    A scale of 0 zeroes the queries: 0 times a masked -inf would be NaN.
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


def stripe_tile(head_dim: int, value_dim: int, arch: tuple[int, int]) -> Tiles:
    """Return the square tile of stripes: an isolated diagonal costs its tile two of them."""
    if arch == (0, 0):
        return Tiles(32, 32, 4, 1)
    small = arch >= (9, 0) or max(padded(head_dim), padded(value_dim)) <= 128
    size = 64 if small else 32
    return Tiles(size, size, 4, 2)
