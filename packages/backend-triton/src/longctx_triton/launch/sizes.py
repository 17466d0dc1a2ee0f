"""Extents of tiles and of pieces of memory."""

from __future__ import annotations

__all__ = ["heads_in_cache", "padded", "used_strides"]


def padded(size: int, least: int = 16) -> int:
    """Return the next power of two, at least ``least``: the extent of a tile."""
    return max(least, 1 << (size - 1).bit_length())


def heads_in_cache(l2: int, seq: int, row_bytes: int, heads: int = 1) -> int:
    """Return how many times ``heads`` heads of ``seq`` rows fit most of the L2 cache, or 1."""
    return max(1, l2 * 5 // 8 // max(1, heads * seq * row_bytes))


def used_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of batch, sequence and heads; 0 where an axis has one entry.

    The stride of such an axis is arbitrary, and Triton compiles anew for an odd one.
    """
    return tuple(
        stride if size > 1 else 0 for size, stride in zip(shape[:3], strides[:3], strict=True)
    )
