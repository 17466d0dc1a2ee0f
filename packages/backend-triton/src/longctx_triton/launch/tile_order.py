"""In which order persistent kernels take tiles: how many heads go together."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

__all__ = ["causal_section", "keys_at_work"]

TILE_COST = 1.5
"""What a tile costs besides its length, in rows of tiles."""
MISS_COST = 0.02
"""What it costs, of all, when keys and values take twice as much as twice the cache."""
WORTHWHILE = 0.985
"""Of the cost of the heads that fit the cache, at which other sections are preferred."""
MOST_ROUNDS = 64
"""Of one tile each program, that are looked at: enough to tell which programs get more."""
EVEN_ROUNDS = 32
"""Of a section; so many leave each program about as much work as the others."""
LONG = 2
"""Times what windows at work take: sequences from which on they count, and not whole sequences."""


def keys_at_work(k_len: int, window: int, anchor: int) -> int:
    """Return how many keys of a head the cache should hold while windows move along it.

    Tiles at work have windows side by side, about two windows long together; with twice as much,
    which leaves fewer heads side by side, windows took 0.996 of the cycles. Of shorter sequences
    all keys count.
    """
    keys = 4 * (window + anchor)
    return keys if 0 < LONG * keys <= k_len else k_len


@lru_cache(maxsize=1024)
def causal_section(tiles: int, units: int, group: int, fitting: int, programs: int) -> int:
    """Choose how many units (batch entries times query heads) a section has.

    Programs take a section's tiles longest first, in rounds that run to and fro over them. Heads
    whose keys fit the cache should go together; but where a section has few rounds, its end may
    meet the next one's start so that the same programs get long tiles again and again.

    Parameters
    ----------
    tiles : int
        Tiles of a unit, each a tile longer than the one before.
    units : int
    group : int
        Query heads of a KV head.
    fitting : int
        KV heads whose keys and values fit the cache.
    programs : int

    Returns
    -------
    int
        At most ``units``.
    """
    own = min(units, group * fitting)
    if own == units or own * tiles >= EVEN_ROUNDS * programs:
        return own
    smaller = {1, fitting // 4, fitting // 2, fitting - 1}
    larger = {fitting + 1, 2 * fitting, 4 * fitting, *(1 << n for n in range(3, 7)), units}
    costs = {
        size: _cost(size, tiles, units, own, programs)
        for size in sorted({min(units, max(1, heads) * group) for heads in smaller | larger})
    }
    best = min(costs, key=costs.__getitem__)
    worthwhile = WORTHWHILE * _cost(own, tiles, units, own, programs)
    return best if costs[best] < worthwhile else own


def _cost(section: int, tiles: int, units: int, cached: int, programs: int) -> float:
    """Return what the program with the most work costs, in what all have on average.

    Keys of more than ``cached`` units do not fit the cache.
    """
    total = tiles * units
    rounds = min(-(-total // programs), MOST_ROUNDS)
    index = torch.arange(rounds * programs, device="cpu").view(rounds, programs)
    index[1::2] = index[1::2].flip(1)
    first = index // (section * tiles) * section
    inside = index - first * tiles
    length = tiles - inside // (units - first).clamp(1, section)
    work = torch.where(index < total, length + TILE_COST, 0.0)
    most = float(work.sum(0).max()) * programs / float(work.sum())
    return most * (1 + MISS_COST * max(0.0, math.log2(section / cached / 2)))
