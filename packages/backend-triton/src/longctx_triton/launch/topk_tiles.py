"""Launch parameters of the exact top-k of rows."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from longctx_triton.launch.sizes import padded

__all__ = ["TopkTiles", "part_count", "topk_tiles"]

MOST_TOP_K = 4096
"""Entries to choose of a row at most, where they are to fit the registers of one program."""

MOST_PARTS = 16
"""Parts of a row at most: the last of them reads what all have kept."""


class TopkTiles(NamedTuple):
    """How one row is reduced.

    Attributes
    ----------
    block, part_block : int
        Scores read at a time: of rows in turn, where other programs hide the latency; of parts of
        a row at once.
    capacity : int
        Most entries among which bisection chooses; half as many are usual.
    sample : int
        Scores that a threshold is guessed from.
    warps, registers, resident : int
        Warps a program, registers a thread, programs a multiprocessor that these allow.
    """

    block: int
    part_block: int
    capacity: int
    sample: int
    warps: int
    registers: int
    resident: int

    @property
    def kept_bytes(self) -> int:
        """Bytes of what a program keeps: scores and positions, a block more than is chosen of."""
        return 8 * (self.capacity + max(self.block, self.part_block))

    def target(self, top_k: int) -> int:
        """Return how many entries to keep: as far from too few as from more than are usual."""
        return math.isqrt(top_k * self.capacity // 2)


@cache
def topk_tiles(top_k: int) -> TopkTiles | None:
    """Return the tiles for a number of entries to choose, None where they would not fit."""
    if top_k > MOST_TOP_K:
        return None
    return TopkTiles(2048, 4096, max(8192, 4 * padded(top_k)), 4096, 8, 64, 4)


def part_count(rows: int, width: int, block: int, programs: int) -> int:
    """Return into how many parts to cut a row: a power of two, 1 where there are rows enough."""
    parts = min(MOST_PARTS, programs // rows, width // block)
    return 1 << (parts.bit_length() - 1) if parts > 1 else 1
