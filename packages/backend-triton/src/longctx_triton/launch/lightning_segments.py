"""How a lightning scan is cut along the sequence when heads alone do not fill the GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = ["Cut", "cut_sequence"]

FULL_ENOUGH = 0.75
"""Share of the multiprocessors with a program above which cutting costs more than it brings."""
PROGRAMS_PER_MULTIPROCESSOR = 2
LEAST_TOKENS = 2048
"""A shorter segment does not pay for reading keys and values twice."""
MOST_SEGMENTS = 32
"""Each segment adds up those before it itself."""
MOST_PROGRAMS_PER_MULTIPROCESSOR = 64


class Cut(NamedTuple):
    """Division of the sequences.

    Attributes
    ----------
    segments : int
        Most segments of one sequence; 1 is the plain scan.
    least_chunks : int
        Chunks that are worth a segment of their own.
    """

    segments: int
    least_chunks: int


@lru_cache(maxsize=4096)
def cut_sequence(sequences: int, packed: bool, tiles: int, tokens: int, processors: int) -> Cut:
    """Choose the number of segments from shapes alone; packed lengths stay on the device.

    Parameters
    ----------
    sequences : int
        Sequences, packed or not.
    packed : bool
        Whether ``tokens`` counts all of them together; one may then be nearly that long.
    tiles : int
        Heads times value tiles: programs of one segment.
    tokens : int
        Length of the (packed) batch entry.
    processors : int
        Streaming multiprocessors.

    Returns
    -------
    Cut
        ``Cut(1, 1)`` where the programs of whole sequences fill the GPU.
    """
    programs = tiles if packed else tiles * sequences
    if programs >= FULL_ENOUGH * processors:
        return Cut(1, 1)
    segments = min(
        PROGRAMS_PER_MULTIPROCESSOR * processors // programs,
        tokens // LEAST_TOKENS,
        MOST_SEGMENTS,
        MOST_PROGRAMS_PER_MULTIPROCESSOR * processors // (tiles * sequences),
    )
    if segments <= 1:
        return Cut(1, 1)
    return Cut(segments, -(-tokens // segments))
