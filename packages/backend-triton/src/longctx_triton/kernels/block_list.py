"""Attention of query blocks over a list of key blocks each (FlexAttention's BlockMask layout)."""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.online_softmax import add_tile, load_rows, store_rows

__all__ = ["block_attention_kernel"]


@triton.jit(
    do_not_specialize=[
        "q_len", "k_len", "capacity", "tiles_a_block", "s_cb", "s_ch", "s_ib", "s_ih", "s_in"
    ]
)  # fmt: skip
def block_attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    counts,  # int32 [B, Hx, Nq]
    indices,  # int32 [B, Hx, Nq, C]
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_kh,
    s_vb,
    s_vn,
    s_vh,
    s_cb,
    s_ch,
    s_ib,
    s_ih,
    s_in,
    q_len,
    k_len,
    units,  # batch * heads
    heads,
    group,
    heads_a_set,
    capacity,
    tiles_a_block,
    scale_log2,
    q_factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Grid ``(units * query tiles,)``; a tile of BM rows lies within one query block.

    Where BN divides BLOCK_K a tile of keys lies within one key block, and those that every row
    sees are not masked; else a tile takes keys from as many blocks as it has room for.
    """
    i_t = (tl.num_programs(0) - 1 - tl.program_id(0)) // units
    i_b = (tl.program_id(0) % units // heads).to(tl.int64)
    i_h = (tl.program_id(0) % units % heads).to(tl.int64)
    block = i_t // tiles_a_block
    row0 = block * BLOCK_Q + i_t % tiles_a_block * BM
    row_end = tl.minimum(block * BLOCK_Q + BLOCK_Q, q_len)
    if row0 >= row_end:
        return
    o_m = row0 + tl.arange(0, BM)
    m_m = o_m < row_end
    first = k_len - q_len
    i_x = i_h // heads_a_set
    p_index = indices + i_b * s_ib + i_x * s_ih + block.to(tl.int64) * s_in
    count = tl.minimum(tl.load(counts + i_b * s_cb + i_x * s_ch + block), capacity)

    p_k = k + i_b * s_kb + i_h // group * s_kh
    p_v = v + i_b * s_vb + i_h // group * s_vh
    b_q = load_rows(q + i_b * s_qb + i_h * s_qh, o_m, s_qn, m_m, D, BLOCK_D)
    b_q = b_q.to(k.dtype.element_ty)  # [BM, D]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    blocks = tl.cdiv(k_len, BLOCK_K)

    for i in range(0, tl.cdiv(count * BLOCK_K, BN)):
        if BLOCK_K % BN == 0:
            b_i = tl.load(p_index + i // (BLOCK_K // BN))
            here = (b_i >= 0) & (b_i < blocks)
            n0 = b_i * BLOCK_K + i % (BLOCK_K // BN) * BN
            o_n = n0 + tl.arange(0, BN)
            m_n = (o_n >= 0) & (o_n < tl.where(here, k_len, 0))
            whole = here & (n0 + BN <= k_len)
            if CAUSAL:
                whole = whole & (n0 + BN - 1 <= first + row0)
        else:
            o_s = i * BN + tl.arange(0, BN)
            b_i = tl.load(p_index + o_s // BLOCK_K, mask=o_s < count * BLOCK_K, other=-1)
            o_n = b_i * BLOCK_K + o_s % BLOCK_K
            m_n = (b_i >= 0) & (b_i < blocks) & (o_n < k_len)
            whole = False
        b_k = load_rows(p_k, o_n, s_kn, m_n, D, BLOCK_D)  # [BN, D]
        b_v = load_rows(p_v, o_n, s_vn, m_n, DV, BLOCK_DV)  # [BN, DV]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
        if SIGNED:
            b_s *= q_factor
        if not whole:
            keep = m_n[None, :]
            if CAUSAL:
                keep = keep & (o_n[None, :] <= first + o_m[:, None])
            b_s = tl.where(keep, b_s, float("-inf"))
        b_m, b_l, b_acc = add_tile(b_s, b_v, b_m, b_l, b_acc, scale_log2)

    s_out = heads * DV
    p_out = out + i_b * q_len * s_out + i_h * DV
    p_lse = lse + (i_b * heads + i_h) * q_len
    store_rows(b_acc, b_m, b_l, p_out, s_out, p_lse, o_m, m_m, DV, BLOCK_DV)
