"""Extents of tiles and of pieces of memory."""

from __future__ import annotations

__all__ = ["aligned", "heads_in_cache", "padded"]


def padded(size: int, least: int = 16) -> int:
    """Return the next power of two, at least ``least``: the extent of a tile."""
    return max(least, 1 << (size - 1).bit_length())


def heads_in_cache(l2: int, seq: int, row_bytes: int, heads: int = 1) -> int:
    """Return how many times ``heads`` heads of ``seq`` rows fit most of the L2 cache, or 1."""
    return max(1, l2 * 5 // 8 // max(1, heads * seq * row_bytes))


def aligned(size: int) -> int:
    """Return the next multiple of 16: numbers of a piece of memory that another one follows."""
    return -(-size // 16) * 16
