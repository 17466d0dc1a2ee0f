"""What the walk of stripes on Hopper reads: bitmaps, lists of columns and bands, columns' copies.

Bands are those of `stripe_bits`: band ``m`` meets the distances from ``128 (m - 1) + 1`` to
``128 (m + 1) - 1``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["stripe_tables_kernel"]


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


@triton.jit
def _list(p_column, p_distance, p_columns, groups, capacity, CHUNK: tl.constexpr):
    """Write a row of lists from two bitmaps; return the number of columns."""
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
    return columns


@triton.jit
def _copy_columns(
    p_k, p_v, s_kn, s_vn, p_columns, p_copy, s_copy, count, capacity,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copy the keys and values of listed columns; zeros after the last up to a whole tile."""
    o_d = tl.arange(0, D)[None, :]
    for i in range(0, tl.minimum(tl.cdiv(count, 128) * 128, capacity), ROWS):
        o_r = i + tl.arange(0, ROWS)
        m_r = (o_r < capacity)[:, None]
        m_c = o_r < tl.minimum(count, capacity)
        o_n = tl.load(p_columns + o_r, mask=m_c, other=0).to(tl.int64)
        b_k = tl.load(p_k + (o_n * s_kn)[:, None] + o_d, mask=m_c[:, None], other=0.0)
        b_v = tl.load(p_v + (o_n * s_vn)[:, None] + o_d, mask=m_c[:, None], other=0.0)
        o_out = o_r.to(tl.int64)[:, None] * D + o_d
        tl.store(p_copy + o_out, b_k, mask=m_r)
        tl.store(p_copy + s_copy + o_out, b_v, mask=m_r)


@triton.jit(
    do_not_specialize=[
        "s_vertical_b", "s_vertical_h", "s_vertical_counts", "s_slash_b", "s_slash_h",
        "s_slash_counts", "s_kb", "s_kn", "s_kh", "s_vb", "s_vn", "s_vh", "copies", "copies_a_set",
        "copies_a_head", "k_len", "groups", "n_vertical", "n_slash", "capacity", "s_list",
    ]
)  # fmt: skip
def stripe_tables_kernel(
    tables,  # int32 [B * copies, 2, 4 (groups + 1), 2]
    lists,  # int32 [B * copies, s_list]: see below
    columns,  # [2, B * copies, capacity, D]: keys and values
    vertical,  # int32 [B, Hx, V]
    vertical_counts,  # int32 [B, Hx]
    slash,
    slash_counts,
    k,
    v,
    s_vertical_b,
    s_vertical_h,
    s_vertical_counts,
    s_slash_b,
    s_slash_h,
    s_slash_counts,
    s_kb,  # strides of keys and values in eights, which makes rows whole words of 16 bytes
    s_kn,
    s_kh,
    s_vb,
    s_vn,
    s_vh,
    copies,
    copies_a_set,
    copies_a_head,
    k_len,
    groups,  # cdiv(k_len, 128) + 1
    n_vertical,
    n_slash,
    capacity,
    s_list,
    D: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid ``(B * copies,)``, one for each set and each KV head: bitmaps, lists, columns.

    ``tables`` are 64 bits from each 32nd place of both bitmaps on: column ``n`` is at place
    ``n + 128`` of the first one, distance ``d`` at place ``128 groups - d`` of the second.

    A row of ``lists`` holds the columns [capacity], in ascending order like all lists; how many of
    them lie below ``128 g`` [groups]; the bands kept in part [groups] and how many of them are at
    most ``m`` [groups]; the bands kept whole and how many of those; and whether tiles walk band
    ``m`` [groups]. All walk band 0, which no list holds.
    """
    i_s = tl.program_id(0).to(tl.int64)
    i_b = i_s // copies
    i_c = i_s % copies
    i_x = i_c // copies_a_set
    words = 4 * (groups + 1)
    p_column = tables + i_s * 4 * words
    p_distance = p_column + 2 * words
    for i in range(0, 4 * words, ENTRIES):
        o_i = i + tl.arange(0, ENTRIES)
        tl.store(p_column + o_i, tl.zeros([ENTRIES], tl.int32), mask=o_i < 4 * words)
    # other threads of the program set bits of these words, and then read them
    tl.debug_barrier()
    count = tl.minimum(tl.load(vertical_counts + i_b * s_vertical_counts + i_x), n_vertical)
    p_index = vertical + i_b * s_vertical_b + i_x * s_vertical_h
    _set_bits(p_column, p_index, count, 128, 1, k_len, ENTRIES)
    count = tl.minimum(tl.load(slash_counts + i_b * s_slash_counts + i_x), n_slash)
    p_index = slash + i_b * s_slash_b + i_x * s_slash_h
    _set_bits(p_distance, p_index, count, 128 * groups, -1, k_len, ENTRIES)
    tl.debug_barrier()

    p_columns = lists + i_s * s_list
    count = _list(p_column, p_distance, p_columns, groups, capacity, CHUNK)
    tl.debug_barrier()
    i_h = i_c // copies_a_head
    s_copy = tl.num_programs(0).to(tl.int64) * capacity * D
    _copy_columns(
        k + (i_b * s_kb + i_h * s_kh) * 8, v + (i_b * s_vb + i_h * s_vh) * 8, s_kn * 8, s_vn * 8,
        p_columns, columns + i_s * capacity * D, s_copy, count, capacity, D, ROWS,
    )  # fmt: skip
