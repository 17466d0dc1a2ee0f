"""Causal attention inside token sets: gather, attend and scatter without compact copies.

A set is ascending, so causality between its slots is causality between its tokens: a tile of query
slots walks the slots before it unmasked, and its own with a triangle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.online_softmax import add_tile, load_rows, store_rows

__all__ = ["token_set_attention_kernel"]


@triton.jit(do_not_specialize=["q_len", "k_len", "capacity", "s_ib", "s_ih", "s_cb"])
def token_set_attention_kernel(
    q,
    k,
    v,
    out,  # zeros
    lse,  # -inf
    indices,  # int32 [B, Hx, C]
    counts,  # int32 [B, Hx]
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_kh,
    s_vb,
    s_vn,
    s_vh,
    s_ib,
    s_ih,
    s_cb,
    q_len,
    k_len,
    units,  # batch * heads
    heads,
    group,
    heads_a_set,
    capacity,
    scale_log2,
    q_factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Grid ``(units * slot tiles,)``; the last slots, which see the most, start first."""
    i_t = (tl.num_programs(0) - 1 - tl.program_id(0)) // units
    i_b = (tl.program_id(0) % units // heads).to(tl.int64)
    i_h = (tl.program_id(0) % units % heads).to(tl.int64)
    i_x = i_h // heads_a_set
    count = tl.minimum(tl.load(counts + i_b * s_cb + i_x), capacity)
    m0 = i_t * BM
    if m0 >= count:
        return
    p_index = indices + i_b * s_ib + i_x * s_ih
    first = k_len - q_len
    o_m = m0 + tl.arange(0, BM)
    b_row = tl.load(p_index + o_m, mask=o_m < count, other=-1)  # tokens of the query slots
    m_m = (b_row >= tl.maximum(first, 0)) & (b_row < k_len)
    if tl.max(b_row, 0) < first:
        return
    b_row -= first

    p_k = k + i_b * s_kb + i_h // group * s_kh
    p_v = v + i_b * s_vb + i_h // group * s_vh
    b_q = load_rows(q + i_b * s_qb + i_h * s_qh, b_row, s_qn, m_m, D, BLOCK_D)
    b_q = b_q.to(k.dtype.element_ty)  # [BM, D]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    for n0 in range(0, tl.minimum(m0 + BM, count), BN):
        o_n = n0 + tl.arange(0, BN)
        b_n = tl.load(p_index + o_n, mask=o_n < count, other=-1)
        m_n = (b_n >= 0) & (b_n < k_len)
        b_k = load_rows(p_k, b_n, s_kn, m_n, D, BLOCK_D)  # [BN, D]
        b_v = load_rows(p_v, b_n, s_vn, m_n, DV, BLOCK_DV)  # [BN, DV]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
        if SIGNED:
            b_s *= q_factor
        if n0 + BN > m0:
            keep = m_n[None, :] & (o_n[None, :] <= o_m[:, None])
            b_s = tl.where(keep, b_s, float("-inf"))
        b_m, b_l, b_acc = add_tile(b_s, b_v, b_m, b_l, b_acc, scale_log2)

    s_out = heads * DV
    p_out = out + i_b * q_len * s_out + i_h * DV
    p_lse = lse + (i_b * heads + i_h) * q_len
    store_rows(b_acc, b_m, b_l, p_out, s_out, p_lse, b_row, m_m, DV, BLOCK_DV)
