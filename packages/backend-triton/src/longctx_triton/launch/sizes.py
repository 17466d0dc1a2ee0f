"""Extents of tiles."""

from __future__ import annotations

__all__ = ["padded"]


def padded(size: int, least: int = 16) -> int:
    """Return the next power of two, at least ``least``: the extent of a tile."""
    return max(least, 1 << (size - 1).bit_length())
