"""Extents of tiles and of pieces of memory."""

from __future__ import annotations

__all__ = ["aligned", "padded"]


def padded(size: int, least: int = 16) -> int:
    """Return the next power of two, at least ``least``: the extent of a tile."""
    return max(least, 1 << (size - 1).bit_length())


def aligned(size: int) -> int:
    """Return the next multiple of 16: numbers of a piece of memory that another one follows."""
    return -(-size // 16) * 16
