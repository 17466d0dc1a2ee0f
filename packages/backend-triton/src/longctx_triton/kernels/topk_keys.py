"""Scores as integers that sort like them, and the choice of the best by such keys."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LEAST",
    "MOST",
    "NOTHING",
    "chosen_places",
    "key_score",
    "middle",
    "ordered_keys",
]

NOTHING = tl.constexpr(-(2**31))
"""The key of what is never chosen; no number has it."""

LEAST = tl.constexpr(-0x7F800000)
"""The key of the lowest finite number."""

MOST = tl.constexpr(0x7F800000)
"""The key of infinity."""


@triton.jit
def ordered_keys(b_x):
    """Return int32 keys that sort like the fp32 scores; -inf and NaN become NOTHING."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    # negative floats order by falling magnitude bits: flip those
    b_keys = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return tl.where(b_x > float("-inf"), b_keys, NOTHING)


@triton.jit
def key_score(key):
    """Return the score of a key between LEAST and MOST; the key below zero's is zero, too."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def middle(low, high):
    """Return the integer half way, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def chosen_places(b_keys, threshold, above_before, equal_before, needed):
    """Return ``(chosen, places)`` of keys in order: above the threshold, or among the equal ones.

    The first ``needed`` keys that equal the threshold are chosen; ``*_before`` count what stands
    before this piece. At most 2**15 keys at a time: both ranks share one scan.
    """
    b_above = (b_keys > threshold).to(tl.int32)
    b_equal = (b_keys == threshold).to(tl.int32)
    b_packed = b_above + (b_equal << 16)
    b_before = tl.cumsum(b_packed, 0) - b_packed
    b_rank = equal_before + (b_before >> 16)
    m_chosen = (b_above > 0) | ((b_equal > 0) & (b_rank < needed))
    b_place = above_before + (b_before & 0xFFFF) + tl.minimum(b_rank, needed)
    return m_chosen, b_place
