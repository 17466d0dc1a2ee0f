"""How a decode call is divided over the GPU, from shapes alone: lengths stay on the device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = ["Split", "split_keys"]

MOST_SPLITS = 256
MOST_BLOCKS = 128
"""Key blocks that one program may walk: a long sequence among short ones must not run alone."""
START_COST = 4
"""What starting a program costs, in key blocks."""
MERGE_COST = 0.1
"""What one more partial result costs, in key blocks."""


class Split(NamedTuple):
    """Division of the keys.

    Attributes
    ----------
    splits : int
        Programs that share one sequence's keys (of one KV head): the grid's size.
    least_blocks : int
        Key blocks that are worth a program of their own; shorter sequences use fewer programs.
    """

    splits: int
    least_blocks: int


@lru_cache(maxsize=4096)
def split_keys(units: int, blocks: int, slots: int) -> Split:
    """Choose the number of splits for ``units`` independent runs over at most ``blocks`` blocks.

    Parameters
    ----------
    units : int
        Batch times KV heads times row blocks.
    blocks : int
        Key blocks that the cache can hold (or the window can reach).
    slots : int
        Programs that the GPU runs at a time.

    Returns
    -------
    Split
        The division with the least estimated time when every sequence fills its cache: waves of
        programs times the blocks of one, as in FlashAttention-3's heuristic, plus the merge.
    """
    most = max(min(blocks, MOST_SPLITS), 1)
    first = max(min(-(-blocks // MOST_BLOCKS), most), 1)
    # beyond two full waves, or one more than there must be, more splits only add merging
    last = max(min(most, max(2 * slots // units, first + slots // units)), first)

    def cost(splits: int) -> float:
        waves = -(-units * splits // slots)
        merge = MERGE_COST * splits if splits > 1 else 0.0
        return waves * (-(-blocks // splits) + START_COST) + merge

    splits = min(range(first, last + 1), key=cost)
    return Split(splits, max(1, min(16, 16 * units // slots)))
