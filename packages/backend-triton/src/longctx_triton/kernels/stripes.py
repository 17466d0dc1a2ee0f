"""Attention over key columns and diagonals: two index kernels and the attention itself.

Seen from a tile of queries that begins at position ``p0``, the keys on a diagonal of distance
``d`` lie in bands: band ``m`` holds the TILE keys from ``p0 - m TILE`` on, whatever ``p0`` is. So
the bands that hold a kept distance are found once a set, and every tile walks the same list, as
far as its bands reach a key at all. Columns inside these bands are merged there by the mask; the
others are gathered.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.online_softmax import add_tile, load_rows, store_rows

__all__ = ["scatter_stripes_kernel", "stripe_attention_kernel", "stripe_index_kernel"]


@triton.jit
def _mark(p_member, p_index, count, o_i, k_len):
    b_i = tl.load(p_index + o_i, mask=o_i < count, other=-1)
    tl.store(p_member + b_i, tl.full(b_i.shape, 1, tl.uint8), mask=(b_i >= 0) & (b_i < k_len))


@triton.jit(do_not_specialize=["k_len", "n_vertical", "n_slash"])
def scatter_stripes_kernel(
    members,  # uint8 [sets, 2, k_len], zeros
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
    n_vertical,
    n_slash,
    BLOCK: tl.constexpr,
):
    """Grid ``(sets, chunks)``: write 1 at each kept column and at each kept distance."""
    i_s = tl.program_id(0)
    i_b = (i_s // sets_a_batch).to(tl.int64)
    i_x = (i_s % sets_a_batch).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_member = members + i_s.to(tl.int64) * 2 * k_len
    count = tl.minimum(tl.load(vertical_counts + i_b * s_cb + i_x), n_vertical)
    _mark(p_member, vertical + i_b * s_vb + i_x * s_vh, count, o_i, k_len)
    count = tl.minimum(tl.load(slash_counts + i_b * s_db + i_x), n_slash)
    _mark(p_member + k_len, slash + i_b * s_sb + i_x * s_sh, count, o_i, k_len)


@triton.jit(do_not_specialize=["k_len", "groups", "n_vertical", "s_list"])
def stripe_index_kernel(
    members,  # uint8 [sets, 2, k_len]
    lists,  # int32 [sets, s_list]: see below
    k_len,
    groups,  # cdiv(k_len, TILE) + 1
    n_vertical,
    s_list,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid ``(sets,)``: list columns and bands in ascending order, and how many come up to where.

    A row of ``lists`` holds the columns [n_vertical]; how many columns lie below ``TILE (g + 1)``
    [groups]; the bands as ``2 m + (kept whole)`` [groups]; how many bands are at most ``m``
    [groups]; and whether band ``m`` is listed [groups].
    """
    i_s = tl.program_id(0).to(tl.int64)
    p_column = members + i_s * 2 * k_len
    p_distance = p_column + k_len
    p_columns = lists + i_s * s_list
    p_column_ranks = p_columns + n_vertical
    p_bands = p_column_ranks + groups
    p_band_ranks = p_bands + groups
    p_listed = p_band_ranks + groups
    o_t = tl.arange(0, TILE)[None, :]
    columns = 0
    bands = 0
    for g0 in range(0, groups, CHUNK):
        o_g = g0 + tl.arange(0, CHUNK)
        m_g = o_g < groups
        o_n = o_g[:, None] * TILE + o_t  # [CHUNK, TILE]
        b_c = tl.load(p_column + o_n, mask=o_n < k_len, other=0).to(tl.int32)
        b_sum = tl.sum(b_c, 1)
        b_upto = columns + tl.cumsum(b_sum, 0)
        b_rank = (b_upto - b_sum)[:, None] + tl.cumsum(b_c, 1) - 1
        tl.store(p_columns + b_rank, o_n, mask=b_c > 0)
        tl.store(p_column_ranks + o_g, b_upto, mask=m_g)
        columns += tl.sum(b_sum)

        # band m meets the distances from TILE (m - 1) + 1 to TILE (m + 1) - 1
        b_d = tl.load(p_distance + o_n, mask=o_n < k_len, other=0).to(tl.int32)
        o_e = o_n - TILE
        m_e = (o_e >= 0) & (o_e < k_len) & (o_t > 0)
        b_d += tl.load(p_distance + o_e, mask=m_e, other=0).to(tl.int32)
        b_kept = tl.sum(b_d, 1)
        b_listed = ((b_kept > 0) & m_g).to(tl.int32)
        b_upto = bands + tl.cumsum(b_listed, 0)
        b_band = 2 * o_g + (b_kept == 2 * TILE - 1).to(tl.int32)
        tl.store(p_bands + b_upto - 1, b_band, mask=b_listed > 0)
        tl.store(p_band_ranks + o_g, b_upto, mask=m_g)
        tl.store(p_listed + o_g, b_listed, mask=m_g)
        bands += tl.sum(b_listed)


@triton.jit(do_not_specialize=["q_len", "k_len", "groups", "n_vertical", "s_list"])
def stripe_attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    members,
    lists,
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_kh,
    s_vb,
    s_vn,
    s_vh,
    q_len,
    k_len,
    units,  # batch * heads
    heads,
    group,
    heads_a_set,
    groups,
    n_vertical,
    s_list,
    scale_log2,
    q_factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TILE: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Grid ``(units * query tiles,)``; the last tiles, which see the most, start first."""
    i_t = (tl.num_programs(0) - 1 - tl.program_id(0)) // units
    i_b = (tl.program_id(0) % units // heads).to(tl.int64)
    i_h = (tl.program_id(0) % units % heads).to(tl.int64)
    i_s = i_b * (heads // heads_a_set) + i_h // heads_a_set
    first = k_len - q_len
    p0 = first + i_t * TILE
    p_last = tl.minimum(p0 + TILE, k_len) - 1
    o_t = tl.arange(0, TILE)
    o_p = p0 + o_t
    m_p = o_p < k_len

    p_column = members + i_s * 2 * k_len
    p_distance = p_column + k_len
    p_columns = lists + i_s * s_list
    p_column_ranks = p_columns + n_vertical
    p_bands = p_column_ranks + groups
    p_band_ranks = p_bands + groups
    p_listed = p_band_ranks + groups
    bands = 0
    columns = 0
    if p_last >= 0:
        bands = tl.load(p_band_ranks + (p0 + TILE - 1) // TILE)
        columns = tl.load(p_column_ranks + p_last // TILE)

    p_k = k + i_b * s_kb + i_h // group * s_kh
    p_v = v + i_b * s_vb + i_h // group * s_vh
    p_q = q + i_b * s_qb + i_h * s_qh
    b_q = load_rows(p_q, o_p - first, s_qn, m_p, D, BLOCK_D)
    b_q = b_q.to(k.dtype.element_ty)  # [TILE, D]
    b_m = tl.full([TILE], float("-inf"), tl.float32)
    b_l = tl.zeros([TILE], tl.float32)
    b_acc = tl.zeros([TILE, BLOCK_DV], tl.float32)

    for i in range(0, bands):
        b_band = tl.load(p_bands + i)
        n0 = p0 - b_band // 2 * TILE
        o_n = n0 + o_t
        m_n = (o_n >= 0) & (o_n < k_len)
        b_k = load_rows(p_k, o_n, s_kn, m_n, D, BLOCK_D)  # [TILE, D]
        b_v = load_rows(p_v, o_n, s_vn, m_n, DV, BLOCK_DV)  # [TILE, DV]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [TILE, TILE]
        if SIGNED:
            b_s *= q_factor
        if (b_band % 2 == 0) | (n0 < 0):
            b_d = o_p[:, None] - o_n[None, :]
            m_d = (b_d >= 0) & m_n[None, :]
            b_keep = tl.load(p_distance + b_d, mask=m_d & (b_d < k_len), other=0)
            b_keep = b_keep | tl.load(p_column + o_n, mask=m_n, other=0)[None, :]
            b_s = tl.where(m_d & (b_keep > 0), b_s, float("-inf"))
        b_m, b_l, b_acc = add_tile(b_s, b_v, b_m, b_l, b_acc, scale_log2)

    for i in range(0, columns, TILE):
        o_i = i + o_t
        o_n = tl.load(p_columns + o_i, mask=o_i < columns, other=k_len)
        m_n = o_n <= p_last
        b_listed = tl.load(p_listed + (p0 + TILE - 1 - o_n) // TILE, mask=m_n, other=1)
        b_k = load_rows(p_k, o_n, s_kn, m_n, D, BLOCK_D)  # [TILE, D]
        b_v = load_rows(p_v, o_n, s_vn, m_n, DV, BLOCK_DV)  # [TILE, DV]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [TILE, TILE]
        if SIGNED:
            b_s *= q_factor
        b_keep = (b_listed == 0)[None, :] & (o_n[None, :] <= o_p[:, None])
        b_s = tl.where(b_keep, b_s, float("-inf"))
        b_m, b_l, b_acc = add_tile(b_s, b_v, b_m, b_l, b_acc, scale_log2)

    s_out = heads * DV
    p_out = out + i_b * q_len * s_out + i_h * DV
    p_lse = lse + (i_b * heads + i_h) * q_len
    store_rows(b_acc, b_m, b_l, p_out, s_out, p_lse, o_p - first, m_p, DV, BLOCK_DV)
