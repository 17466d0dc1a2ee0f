"""Exact top-k of rows: a guessed threshold, one pass over the row, a choice among what is left.

A sample of the row gives a score that somewhat more than k entries should reach. One pass keeps
those entries, in order of position. If they are at least k and not too many, the k best of them
are the k best of the row, found by bisection in registers. Otherwise the threshold moves and the
pass is repeated, at last by bisection over all thresholds: the choice is always exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.index_scores import row_bounds
from longctx_triton.kernels.topk_keys import (
    LEAST,
    MOST,
    NOTHING,
    chosen_places,
    key_score,
    middle,
    ordered_keys,
)

__all__ = ["topk_rows_kernel"]

PIECE = tl.constexpr(8)
"""Entries that a sample takes side by side: a sector of memory."""

GUESSES = tl.constexpr(3)
"""Thresholds that are taken from a sample before bisection."""


@triton.jit
def ranked_key(b_keys, least, count, rank, enough):
    """Return a key that from ``rank`` to ``enough`` keys reach, or the ``rank``-th where more tie.

    By bisection; ``count`` keys reach ``least``, which is returned if fewer than ``rank`` do.
    """
    most = tl.max(b_keys, 0)
    # count(keys >= least) >= rank > count(keys > most)
    while (least < most) & (count > enough):
        mid = middle(least, most)
        n_mid = tl.sum((b_keys >= mid).to(tl.int32), 0)
        if n_mid >= rank:
            least = mid
            count = n_mid
        else:
            most = mid - 1
    return least


@triton.jit
def sampled_key(p_row, i_row, low, high, rank, SAMPLE: tl.constexpr):
    """Return a key that about ``rank`` of SAMPLE scattered entries reach; LEAST if fewer do."""
    PIECES: tl.constexpr = SAMPLE // PIECE
    o_s = tl.arange(0, SAMPLE)
    i_p = o_s // PIECE
    first = low // PIECE * PIECE
    units = (high - first) // PIECE
    part = units // PIECES
    # a place within each of PIECES equal parts, by a multiplicative hash: scores may be periodic
    b_shift = (((i_p + i_row) * 40503) & 0xFFFF) * tl.minimum(part, 0x7FFF) >> 16
    b_unit = i_p * part + i_p * (units % PIECES) // PIECES + b_shift
    o_n = first + b_unit * PIECE + o_s % PIECE
    b_keys = tl.where(o_n >= low, ordered_keys(tl.load(p_row + o_n)), NOTHING)
    least = tl.full([], LEAST, tl.int32)
    count = tl.full([], SAMPLE, tl.int32)
    return ranked_key(b_keys, least, count, rank, rank + rank // 16)


@triton.jit
def load_block(p_row, n0, low, high, BLOCK: tl.constexpr):
    """Return the scores of a block, -inf outside ``[low, high)``; ``n0`` is a multiple of 16."""
    o_n = n0 + tl.arange(0, BLOCK)
    if (n0 >= low) & (n0 + BLOCK <= high):
        b_x = tl.load(p_row + o_n)
    else:
        b_x = tl.load(p_row + o_n, mask=(o_n >= low) & (o_n < high), other=float("-inf"))
    return b_x


@triton.jit
def keep(p_kept, b_place, b_x, o_n, m_kept, ROOM: tl.constexpr):
    """Write scores and positions to their places."""
    p_place = p_kept + b_place
    # said to be contiguous, the places keep the layout of the loads; for scattered ones the
    # compiler takes another, and scans twice. The stores are no wider for it: their width is that
    # of their mask, too, and it differs from entry to entry.
    tl.max_contiguous(tl.multiple_of(p_place, 16), 4)
    tl.store(p_place, b_x.to(tl.int32, bitcast=True), mask=m_kept)
    tl.store(p_place + ROOM, o_n, mask=m_kept)


@triton.jit
def keep_reaching(
    p_row, p_kept, begin, end, low, high, threshold,
    CAPACITY: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep what reaches the threshold in ``[begin, end)``; return how many.

    After more than CAPACITY nothing is kept or counted. ``begin`` is a multiple of 16.
    """
    # two forms of one comparison: a mask that outlives the scan takes more instructions than a
    # second comparison. Two keys stand for zero, so the score below it is that of the third.
    least = key_score(threshold)
    below = key_score(tl.where(threshold == 0, -2, threshold - 1))
    kept = 0
    for n0 in range(begin, end, BLOCK):
        b_x = load_block(p_row, n0, low, tl.minimum(end, high), BLOCK)
        b_kept = (b_x >= least).to(tl.int32)
        b_place = kept + tl.cumsum(b_kept, 0) - 1
        keep(p_kept, b_place, b_x, n0 + tl.arange(0, BLOCK), b_x > below, ROOM)
        kept += tl.sum(b_kept, 0)
        least = tl.where(kept > CAPACITY, float("nan"), least)
        below = tl.where(kept > CAPACITY, float("nan"), below)
    return kept


@triton.jit
def keep_with_ties(
    p_row, p_kept, begin, low, high, threshold, most_equal,
    ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep what is above the threshold, and ``most_equal`` of what equals it; count all of both.

    Places behind the room are counted only.
    """
    above = 0
    equal = 0
    least = key_score(threshold)
    for n0 in range(begin, high, BLOCK):
        b_x = load_block(p_row, n0, low, high, BLOCK)
        b_above = (b_x > least).to(tl.int32)
        b_equal = (b_x == least).to(tl.int32)
        b_packed = b_above + (b_equal << 16)
        b_before = tl.cumsum(b_packed, 0) - b_packed
        b_rank = equal + (b_before >> 16)
        b_place = above + (b_before & 0xFFFF) + tl.minimum(b_rank, most_equal)
        m_kept = (b_above > 0) | ((b_equal > 0) & (b_rank < most_equal))
        m_kept = m_kept & (b_place < ROOM)
        keep(p_kept, b_place, b_x, n0 + tl.arange(0, BLOCK), m_kept, ROOM)
        above += tl.sum(b_above, 0)
        equal += tl.sum(b_equal, 0)
    return above, equal


@triton.jit
def keep_after_all(
    p_row, p_kept, i_row, begin, low, high, threshold, rank, target, top_k,
    CAPACITY: tl.constexpr, ROOM: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Repeat the pass until at least ``top_k`` entries, or all there are, are kept.

    The k-th best key always serves, for ties with it are cut to ``top_k``, and ``2 top_k`` fit.
    It lies between ``least`` and ``most``, and a threshold that does not serve is excluded.
    Returns the threshold and how many are kept.
    """
    least = tl.full([], LEAST, tl.int32)
    most = tl.full([], MOST, tl.int32)
    kept = 0
    tries = 0
    searching = 1
    while searching > 0:
        above, equal = keep_with_ties(
            p_row, p_kept, begin, low, high, threshold, top_k, ROOM, BLOCK
        )
        kept = above + tl.minimum(equal, top_k)
        if (above + equal < top_k) & (threshold > LEAST):
            most = threshold - 1
        elif kept > CAPACITY:
            least = threshold + 1
        else:
            searching = 0
        if searching > 0:
            tries += 1
            if tries < GUESSES:
                rank = rank * target // tl.maximum(above + equal, 1)
                rank = tl.minimum(tl.maximum(rank, 1), SAMPLE)
                threshold = sampled_key(p_row, i_row + tries, low, high, rank, SAMPLE)
                threshold = tl.minimum(tl.maximum(threshold, least), most)
            else:
                threshold = middle(least, most)
    return threshold, kept


@triton.jit
def kept_offsets(o_c, p_parts, PARTS: tl.constexpr, ROOM: tl.constexpr):
    """Return where the ``o_c``-th of the kept entries stands, those of all parts in a row.

    What is behind the last of them is behind the last of the last part.
    """
    o_kept = o_c
    if PARTS > 1:
        before = 0
        for i_s in tl.static_range(PARTS - 1):
            n_part = tl.load(p_parts + i_s)
            before += n_part
            o_kept += tl.where(o_c >= before, 2 * ROOM - n_part, 0)
    return o_kept


@triton.jit
def kept_key(
    p_kept, p_parts, threshold, kept, wanted,
    PARTS: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return a key that at least ``wanted`` kept entries reach; and how many equal it of those."""
    o_c = tl.arange(0, WIDTH)
    p_c = p_kept + kept_offsets(o_c, p_parts, PARTS, ROOM)
    # a mask in steps of 16 keeps the loads wide; what lies between was never written
    b_x = tl.load(p_c, mask=o_c < tl.cdiv(kept, 16) * 16, other=0).to(tl.float32, bitcast=True)
    b_keys = tl.where(o_c < kept, ordered_keys(b_x), NOTHING)
    key = ranked_key(b_keys, threshold, kept, wanted, wanted)
    return key, wanted - tl.sum((b_keys > key).to(tl.int32), 0)


@triton.jit
def emit_kept(
    p_kept, p_parts, key, needed, kept, wanted, p_result, top_k,
    PARTS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the positions of the ``wanted`` best of what is kept, ascending, then -1.

    Those are above the key, or among the first ``needed`` that equal it. The scores are read
    again: that takes fewer registers than to hold all of them beside their places.
    """
    o_b = tl.arange(0, BLOCK)
    above = 0
    equal = 0
    for c0 in range(0, kept, BLOCK):
        m_b = c0 + o_b < tl.cdiv(kept, 16) * 16
        p_b = p_kept + kept_offsets(c0 + o_b, p_parts, PARTS, ROOM)
        b_x = tl.load(p_b, mask=m_b, other=0).to(tl.float32, bitcast=True)
        b_position = tl.load(p_b + ROOM, mask=m_b, other=0)
        b_keys = tl.where(c0 + o_b < kept, ordered_keys(b_x), NOTHING)
        m_chosen, b_place = chosen_places(b_keys, key, above, equal, needed)
        p_place = p_result + b_place
        tl.max_contiguous(tl.multiple_of(p_place, 16), 4)  # as in `keep`
        tl.store(p_place, b_position, mask=m_chosen)
        above += tl.sum((b_keys > key).to(tl.int32), 0)
        equal += tl.sum((b_keys == key).to(tl.int32), 0)
    for n0 in range(wanted // BLOCK * BLOCK, top_k, BLOCK):
        m_rest = (n0 + o_b >= wanted) & (n0 + o_b < top_k)
        tl.store(p_result + n0 + o_b, tl.full([BLOCK], -1, tl.int32), mask=m_rest)


@triton.jit(
    do_not_specialize=[
        "b_first", "t_first", "rows_a_batch", "rows", "q_len", "shift", "k_len", "top_k", "target",
        "s_xb", "s_yb",
    ]
)  # fmt: skip
def topk_rows_kernel(
    scores,  # fp32 [rows, stride]
    key_start,  # int32 [B, Sq], read with RANGE
    key_end,
    kept,  # int32 [programs, PARTS, 2, CAPACITY + BLOCK]: bits of scores, positions
    counts,  # int32 [rows, 1 + PARTS], read with PARTS > 1: zeros first
    result,  # int32 [B, Sq, top_k]
    s_xb,
    s_yb,
    b_first,
    t_first,
    rows_a_batch,
    rows,
    q_len,
    shift,  # query t sees the keys before t + shift + 1
    k_len,
    stride,  # a multiple of 16
    top_k,
    target,  # how many entries are to be kept
    CAPACITY: tl.constexpr,  # at least 2 top_k
    SAMPLE: tl.constexpr,  # at most CAPACITY
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    RANGE: tl.constexpr,
):
    """Grid ``(PARTS, programs)``: rows in turn; or the parts of a row at once, a program a row.

    Row ``r`` is query ``t_first + r % rows_a_batch``. The last of its parts to be done chooses.
    """
    ROOM: tl.constexpr = CAPACITY + BLOCK
    i_s = tl.program_id(0)
    p_own = kept + tl.program_id(1).to(tl.int64) * (PARTS * 2 * ROOM)
    # what does not change from row to row would take registers in the passes over a row
    for i_row in tl.range(tl.program_id(1), rows, tl.num_programs(1), disable_licm=True):
        i_b = tl.cast(b_first + i_row // rows_a_batch, tl.int64)
        i_t = t_first + i_row % rows_a_batch
        p_row = scores + tl.cast(i_row, tl.int64) * stride
        p_result = result + (i_b * q_len + i_t) * top_k
        p_parts = counts + tl.cast(i_row, tl.int64) * (1 + PARTS) + 1
        low, high = row_bounds(
            i_t, i_t >= 0, key_start + i_b * s_xb, key_end + i_b * s_yb, shift, k_len, True, RANGE
        )
        begin = low // 16 * 16
        length = high - begin
        threshold = tl.full([], LEAST, tl.int32)
        rank = tl.maximum(target * SAMPLE // tl.maximum(length, 1), 1)
        if length > CAPACITY:
            threshold = sampled_key(p_row, i_row, low, high, rank, SAMPLE)
        if PARTS == 1:
            n_kept = keep_reaching(
                p_row, p_own, begin, high, low, high, threshold, CAPACITY, ROOM, BLOCK
            )
            last = True
        else:
            span = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
            n0 = begin + i_s * span
            n_own = keep_reaching(
                p_row, p_own + i_s * (2 * ROOM), n0, tl.minimum(n0 + span, high), low, high,
                threshold, CAPACITY, ROOM, BLOCK,
            )  # fmt: skip
            tl.store(p_parts + i_s, n_own)
            tl.debug_barrier()
            last = tl.atomic_add(p_parts - 1, 1, sem="acq_rel") == PARTS - 1
            n_kept = 0
        if last:
            tl.debug_barrier()
            if PARTS > 1:
                n_kept = tl.sum(tl.load(p_parts + tl.arange(0, PARTS)), 0)
            if ((n_kept < top_k) & (threshold > LEAST)) | (n_kept > CAPACITY):
                threshold, n_kept = keep_after_all(
                    p_row, p_own, i_row, begin, low, high, threshold, rank, target, top_k,
                    CAPACITY, ROOM, SAMPLE, BLOCK,
                )  # fmt: skip
                if PARTS > 1:  # all of them are in the first part
                    o_s = tl.arange(0, PARTS)
                    tl.store(p_parts + o_s, tl.where(o_s == 0, n_kept, 0))
                tl.debug_barrier()
            wanted = tl.minimum(n_kept, top_k)
            if n_kept <= CAPACITY // 2:
                key, needed = kept_key(
                    p_own, p_parts, threshold, n_kept, wanted, PARTS, ROOM, CAPACITY // 2
                )
            else:
                key, needed = kept_key(
                    p_own, p_parts, threshold, n_kept, wanted, PARTS, ROOM, CAPACITY
                )
            emit_kept(
                p_own, p_parts, key, needed, n_kept, wanted, p_result, top_k, PARTS, ROOM, BLOCK
            )
            tl.debug_barrier()
