"""Attention of every query over first keys and one run of keys that ends with itself.

Query position ``p`` sees key ``n`` when ``n <= p`` and (``n < anchor`` or ``n >= low(p)``).
Sliding windows with sinks have ``low(p) = p - window``, Star Attention's blocks of size ``b`` have
``low(p) = p // b * b``. A tile of queries walks two runs of keys and nothing else; only the edges
of the runs are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.online_softmax import add_tile, load_rows, store_rows

__all__ = ["range_attention_kernel"]


@triton.jit(
    do_not_specialize=[
        "q_len", "k_len", "origin", "block", "tiles_a_block", "anchor", "window", "last_queries",
    ]
)  # fmt: skip
def range_attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    head_windows,  # int32 [Hq], read with HEAD_WINDOWS
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
    origin,  # position of tile 0's first row
    block,  # positions that the tiles cover before they start anew
    tiles_a_block,
    anchor,
    window,
    last_queries,
    scale_log2,
    q_factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    HEAD_WINDOWS: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Grid ``(units * tiles,)``; the last tiles, which see the most, start first."""
    i_t = (tl.num_programs(0) - 1 - tl.program_id(0)) // units
    i_b = tl.program_id(0) % units // heads
    i_h = tl.program_id(0) % units % heads
    first = k_len - q_len
    low0 = origin + i_t // tiles_a_block * block
    p0 = low0 + i_t % tiles_a_block * BM
    p_end = tl.minimum(k_len, low0 + block)
    p_last = tl.minimum(p0 + BM, p_end) - 1
    if p_last < first:
        return
    if p0 >= p_end:
        return
    o_p = p0 + tl.arange(0, BM)
    m_p = (o_p >= first) & (o_p < p_end)

    # the least key of each row's own run, and its extremes over the tile
    if BY_BLOCK:
        b_low = tl.zeros([BM], tl.int32) + low0
        low_min = low0
        low_max = low0
    else:
        if HEAD_WINDOWS:
            window = tl.minimum(tl.load(head_windows + i_h), k_len)
        p_all = k_len - last_queries  # rows from here on see everything
        b_low = tl.where(o_p >= p_all, 0, tl.maximum(o_p - window, 0))
        low_min = tl.where(p_last >= p_all, 0, tl.maximum(p0 - window, 0))
        low_max = tl.where(p0 >= p_all, 0, tl.maximum(p_last - window, 0))

    b64 = i_b.to(tl.int64)
    h64 = i_h.to(tl.int64)
    p_k = k + b64 * s_kb + h64 // group * s_kh
    p_v = v + b64 * s_vb + h64 // group * s_vh
    b_q = load_rows(q + b64 * s_qb + h64 * s_qh, o_p - first, s_qn, m_p, D, BLOCK_D)
    b_q = b_q.to(k.dtype.element_ty)  # [BM, D]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BLOCK_DV], tl.float32)

    # tiles of first keys, as far as the tile's own run does not reach them, then the run's
    a_end = tl.minimum(anchor, low_min)
    a_tiles = tl.cdiv(a_end, BN)
    for i in range(0, a_tiles + tl.cdiv(tl.maximum(p_last + 1 - low_min, 0), BN)):
        in_run = i >= a_tiles
        n0 = tl.where(in_run, low_min + (i - a_tiles) * BN, i * BN)
        bound = tl.where(in_run, k_len, a_end)
        whole = tl.where(in_run, (n0 >= low_max) & (n0 + BN <= p0 + 1), n0 + BN <= a_end)
        o_n = n0 + tl.arange(0, BN)
        m_n = o_n < bound
        b_k = load_rows(p_k, o_n, s_kn, m_n, D, BLOCK_D)  # [BN, D]
        b_v = load_rows(p_v, o_n, s_vn, m_n, DV, BLOCK_DV)  # [BN, DV]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
        if SIGNED:
            b_s *= q_factor
        if not whole:
            m_near = (o_n[None, :] >= b_low[:, None]) | (o_n < anchor)[None, :]
            keep = m_near & m_n[None, :] & (o_n[None, :] <= o_p[:, None])
            b_s = tl.where(keep, b_s, float("-inf"))
        b_m, b_l, b_acc = add_tile(b_s, b_v, b_m, b_l, b_acc, scale_log2)

    s_out = heads * DV
    p_out = out + b64 * q_len * s_out + h64 * DV
    p_lse = lse + (b64 * heads + h64) * q_len
    store_rows(b_acc, b_m, b_l, p_out, s_out, p_lse, o_p - first, m_p, DV, BLOCK_DV)
