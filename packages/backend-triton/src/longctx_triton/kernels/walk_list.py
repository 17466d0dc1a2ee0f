"""Lists of key blocks as walks: sorted, split into steps, those that need a mask in front."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["walk_list_kernel"]


@triton.jit(
    do_not_specialize=[
        "s_cb", "s_ch", "s_cn", "s_ib", "s_ih", "s_in", "s_ic", "sets", "tiles", "q_len", "k_len",
        "capacity", "room", "block_q", "rows", "each",
    ]
)  # fmt: skip
def walk_list_kernel(
    counts,  # int32 [B, Hx, Nq]
    indices,  # int32 [B, Hx, Nq, C]
    starts,  # int32 [B * Hx * tiles, room]
    walks,  # int32 [B * Hx * tiles, 2]
    s_cb,
    s_ch,
    s_cn,
    s_ib,
    s_ih,
    s_in,
    s_ic,
    sets,
    tiles,
    q_len,
    k_len,
    capacity,
    room,
    block_q,
    rows,  # of a tile; a divisor of block_q or no fewer than q_len
    each,  # steps of a key block
    BLOCK_K: tl.constexpr,
    ENTRIES: tl.constexpr,
    BINS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Grid ``(B * Hx * tiles,)``: first keys from the last to the first, and (masked, all) steps.

    A step is masked when a row of the tile does not see all of it; these are the last keys. A
    walk has a masked step at least: without keys one behind the last key.
    """
    number = tl.program_id(0)
    i_t = number % tiles
    i_x = (number // tiles % sets).to(tl.int64)
    i_b = (number // tiles // sets).to(tl.int64)
    block = (i_t * rows // block_q).to(tl.int64)
    count = tl.minimum(tl.load(counts + i_b * s_cb + i_x * s_ch + block * s_cn), capacity)
    p_index = indices + i_b * s_ib + i_x * s_ih + block * s_in
    p_starts = starts + number.to(tl.int64) * room

    all_steps = tl.cdiv(k_len, BLOCK_K)
    end = all_steps  # steps from here on nobody sees
    whole = k_len // BLOCK_K  # steps before this one every row sees whole
    if CAUSAL:
        p0 = i_t * rows + k_len - q_len
        p_last = tl.minimum(i_t * rows + rows, q_len) - 1 + k_len - q_len
        end = tl.minimum(end, tl.where(p_last < 0, 0, p_last // BLOCK_K + 1))
        whole = tl.minimum(whole, tl.where(p0 < 0, 0, (p0 + 1) // BLOCK_K))

    # planners list in rising order as a rule: then the walk is the list backwards
    disorder = 0
    found = 0
    masked = 0
    for i in range(0, count, ENTRIES):
        o_c = i + tl.arange(0, ENTRIES)
        listed = o_c < count
        b_block = tl.load(p_index + o_c * s_ic, mask=listed, other=0)
        b_before = tl.load(p_index + (o_c - 1) * s_ic, mask=listed & (o_c > 0), other=-1)
        disorder += tl.sum((listed & (b_block <= b_before)).to(tl.int32))
        b_steps = tl.minimum(tl.maximum(end - b_block * each, 0), each)
        b_whole = tl.minimum(tl.maximum(whole - b_block * each, 0), b_steps)
        found += tl.sum(tl.where(listed, b_steps, 0))
        masked += tl.sum(tl.where(listed, b_steps - b_whole, 0))
    if disorder == 0:
        for i in range(0, count, ENTRIES):
            o_c = i + tl.arange(0, ENTRIES)
            listed = o_c < count
            b_step = tl.load(p_index + o_c * s_ic, mask=listed, other=0) * each
            for e in range(each):
                keep = listed & (b_step + e < end)
                tl.store(
                    p_starts + (found - 1 - o_c * each - e), (b_step + e) * BLOCK_K, mask=keep
                )
    else:
        found = 0
        masked = 0
        o_bin = tl.arange(0, BINS)
        for i_c in range(tl.cdiv(all_steps, BINS)):
            high = all_steps - 1 - i_c * BINS  # step of bin 0; they run downwards
            b_kept = tl.zeros([BINS], tl.int32)
            for i in range(0, count, ENTRIES):
                o_c = i + tl.arange(0, ENTRIES)
                b_block = tl.load(p_index + o_c * s_ic, mask=o_c < count, other=-1)
                for e in range(each):
                    b_bin = high - (b_block * each + e)
                    fits = (b_block >= 0) & (b_block < all_steps) & (b_bin >= 0) & (b_bin < BINS)
                    b_bin = tl.where(fits, b_bin, 0)
                    b_kept += tl.histogram(b_bin, BINS, mask=fits)
            b_step = high - o_bin
            b_keep = (b_kept > 0) & (b_step < end) & (b_step >= 0)
            b_one = b_keep.to(tl.int32)
            b_place = found + tl.cumsum(b_one, 0) - 1
            tl.store(p_starts + b_place, b_step * BLOCK_K, mask=b_keep)
            found += tl.sum(b_one)
            masked += tl.sum(tl.where(b_step >= whole, b_one, 0))
    if found == 0:
        tl.store(p_starts, all_steps * BLOCK_K)
    tl.store(walks + 2 * number.to(tl.int64), tl.maximum(masked, 1))
    tl.store(walks + 2 * number.to(tl.int64) + 1, tl.maximum(found, 1))
