"""What the walk of stripes on Hopper reads: bitmaps, lists of columns and bands, columns' copies.

Bands are those of `stripe_bits`: band ``m`` meets the distances from ``128 (m - 1) + 1`` to
``128 (m + 1) - 1``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gather_columns_kernel", "stripe_lists_kernel"]


@triton.jit
def _set_bits(p_table, p_index, count, origin, sign, k_len, ENTRIES: tl.constexpr):
    """Set bits ``origin + sign * index`` of a bitmap of 0."""
    for i in range(0, count, ENTRIES):
        o_i = i + tl.arange(0, ENTRIES)
        b_i = tl.load(p_index + o_i, mask=o_i < count, other=-1)
        fits = (b_i >= 0) & (b_i < k_len)
        b_bit = tl.where(fits, origin + sign * b_i, 0)
        # a word is the lower half of its own entry, and the upper one of the entry before
        p_word = p_table + 2 * (b_bit // 32)
        b_one = 1 << (b_bit % 32)
        tl.atomic_or(p_word, b_one, mask=fits, sem="relaxed")
        tl.atomic_or(p_word - 1, b_one, mask=fits & (b_bit >= 32), sem="relaxed")


@triton.jit
def _bits(p_table, o_w, o_t, mask):
    """Return bits ``o_t`` of groups of four words, of which ``o_w`` are the first."""
    b_word = tl.load(p_table + 2 * (o_w + o_t // 32), mask=mask, other=0)
    return (b_word >> (o_t % 32)) & 1


@triton.jit(
    do_not_specialize=[
        "s_vb", "s_vh", "s_cb", "s_sb", "s_sh", "s_db", "sets_a_batch", "k_len", "groups",
        "n_vertical", "n_slash", "capacity", "s_list",
    ]
)  # fmt: skip
def stripe_lists_kernel(
    tables,  # int32 [sets, 2, 4 (groups + 1), 2]
    lists,  # int32 [sets, s_list]: see below
    vertical,  # int32 [B, Hx, V]
    vertical_counts,  # int32 [B, Hx]
    slash,
    slash_counts,
    s_vb,
    s_vh,
    s_cb,
    s_sb,
    s_sh,
    s_db,
    sets_a_batch,
    k_len,
    groups,  # cdiv(k_len, 128) + 1
    n_vertical,
    n_slash,
    capacity,
    s_list,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid ``(sets,)``: both bitmaps, and what they hold as lists.

    ``tables`` are 64 bits from each 32nd place of both bitmaps on: column ``n`` is at place
    ``n + 128`` of the first one, distance ``d`` at place ``128 groups - d`` of the second.

    A row of ``lists`` holds the columns [capacity], in ascending order like all lists; how many of
    them lie below ``128 g`` [groups]; the bands kept in part [groups] and how many of them are at
    most ``m`` [groups]; the bands kept whole and how many of those; and whether tiles walk band
    ``m`` [groups]. All walk band 0, which no list holds.
    """
    i_s = tl.program_id(0).to(tl.int64)
    i_b = i_s // sets_a_batch
    i_x = i_s % sets_a_batch
    words = 4 * (groups + 1)
    p_column = tables + i_s * 4 * words
    p_distance = p_column + 2 * words
    for i in range(0, 4 * words, ENTRIES):
        o_i = i + tl.arange(0, ENTRIES)
        tl.store(p_column + o_i, tl.zeros([ENTRIES], tl.int32), mask=o_i < 4 * words)
    # other threads of the program set bits of these words, and then read them
    tl.debug_barrier()
    count = tl.minimum(tl.load(vertical_counts + i_b * s_cb + i_x), n_vertical)
    p_index = vertical + i_b * s_vb + i_x * s_vh
    _set_bits(p_column, p_index, count, 128, 1, k_len, ENTRIES)
    count = tl.minimum(tl.load(slash_counts + i_b * s_db + i_x), n_slash)
    p_index = slash + i_b * s_sb + i_x * s_sh
    _set_bits(p_distance, p_index, count, 128 * groups, -1, k_len, ENTRIES)
    tl.debug_barrier()

    p_columns = lists + i_s * s_list
    p_below = p_columns + capacity
    p_part = p_below + groups
    p_part_ranks = p_part + groups
    p_whole = p_part_ranks + groups
    p_whole_ranks = p_whole + groups
    p_listed = p_whole_ranks + groups
    o_t = tl.arange(0, 128)[None, :]
    columns = 0
    part = 0
    whole = 0
    for g0 in range(0, groups, CHUNK):
        o_g = g0 + tl.arange(0, CHUNK)
        m_g = o_g < groups
        o_r = o_g[:, None]
        b_c = _bits(p_column, 4 * (o_r + 1), o_t, m_g[:, None])  # [CHUNK, 128]
        b_sum = tl.sum(b_c, 1)
        b_below = columns + tl.cumsum(b_sum, 0) - b_sum
        b_rank = b_below[:, None] + tl.cumsum(b_c, 1) - 1
        tl.store(p_columns + b_rank, o_r * 128 + o_t, mask=b_c > 0)
        tl.store(p_below + o_g, b_below, mask=m_g)
        columns += tl.sum(b_sum)

        # distance 128 m is the first bit of group (groups - m); greater ones lie before it
        o_w = 4 * (groups - o_r)
        b_d = _bits(p_distance, o_w, o_t, m_g[:, None])
        b_d += _bits(p_distance, o_w - 4, o_t, m_g[:, None] & (o_t > 0))
        b_kept = tl.sum(b_d, 1)
        m_band = m_g & (o_g > 0)
        b_part = ((b_kept > 0) & (b_kept < 255) & m_band).to(tl.int32)
        b_whole = ((b_kept == 255) & m_band).to(tl.int32)
        b_upto = part + tl.cumsum(b_part, 0)
        tl.store(p_part + b_upto - 1, o_g, mask=b_part > 0)
        tl.store(p_part_ranks + o_g, b_upto, mask=m_g)
        b_upto = whole + tl.cumsum(b_whole, 0)
        tl.store(p_whole + b_upto - 1, o_g, mask=b_whole > 0)
        tl.store(p_whole_ranks + o_g, b_upto, mask=m_g)
        tl.store(p_listed + o_g, ((b_kept > 0) | (o_g == 0)).to(tl.int32), mask=m_g)
        part += tl.sum(b_part)
        whole += tl.sum(b_whole)


@triton.jit(
    do_not_specialize=[
        "s_kb", "s_kn", "s_kh", "s_vb", "s_vn", "s_vh", "copies", "copies_a_head", "sets",
        "copies_a_set", "groups", "capacity", "s_list",
    ]
)  # fmt: skip
def gather_columns_kernel(
    k,
    v,
    columns,  # [2, B, copies, capacity, D], contiguous
    lists,
    s_kb,  # strides of keys and values in eights, which makes rows whole words of 16 bytes
    s_kn,
    s_kh,
    s_vb,
    s_vn,
    s_vh,
    copies,
    copies_a_head,
    sets,  # of a batch entry
    copies_a_set,
    groups,
    capacity,
    s_list,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid ``(B * copies, cdiv(capacity, ROWS))``: the columns' keys and values; zeros behind."""
    i_b = (tl.program_id(0) // copies).to(tl.int64)
    i_c = (tl.program_id(0) % copies).to(tl.int64)
    p_list = lists + (i_b * sets + i_c // copies_a_set) * s_list
    count = tl.load(p_list + capacity + groups - 1)
    o_r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < capacity
    m_c = (o_r < count) & m_r
    o_n = tl.load(p_list + o_r, mask=m_c, other=0).to(tl.int64)
    o_d = tl.arange(0, D)[None, :]
    p_k = k + (i_b * s_kb + i_c // copies_a_head * s_kh) * 8
    p_v = v + (i_b * s_vb + i_c // copies_a_head * s_vh) * 8
    o_out = (tl.program_id(0).to(tl.int64) * capacity + o_r)[:, None] * D + o_d
    s_out = tl.num_programs(0).to(tl.int64) * capacity * D
    b_k = tl.load(p_k + (o_n * s_kn * 8)[:, None] + o_d, mask=m_c[:, None], other=0.0)
    b_v = tl.load(p_v + (o_n * s_vn * 8)[:, None] + o_d, mask=m_c[:, None], other=0.0)
    tl.store(columns + o_out, b_k, mask=m_r[:, None])
    tl.store(columns + s_out + o_out, b_v, mask=m_r[:, None])
