"""Gradients of the lightning indexer: one kernel by queries, one by keys, no atomic additions.

With ``g`` the gradient of the scores, 0 where a key is not seen: ``dweights[t, h] = sum_s g[t, s]
relu(d)``, ``dd[t, h, s] = g[t, s] weights[t, h] [d > 0]`` for the product ``d = q[t, h] . k[s]``,
``dq[t, h] = sum_s dd k[s]`` and ``dk[s] = sum_th dd q[t, h]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.index_scores import row_bounds

__all__ = ["score_backward_keys_kernel", "score_backward_queries_kernel"]


@triton.jit(do_not_specialize=["q_len", "k_len", "s_wb", "s_wn", "s_xb", "s_yb"])
def score_backward_queries_kernel(
    dscores,  # fp32 [B, Sq, Sk]
    q,
    k,
    weights,
    key_start,
    key_end,
    dq,
    dweights,
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_wb,
    s_wn,
    s_xb,
    s_yb,
    q_len,
    k_len,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
):
    """Grid ``(query tiles, batch)``; rows of a tile are (query, head) pairs."""
    i_b = tl.program_id(1).to(tl.int64)
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BT
    o_r = tl.arange(0, BT * BLOCK_H)
    o_t = t0 + o_r // BLOCK_H
    o_h = o_r % BLOCK_H
    m_t = o_t < q_len
    m_r = m_t & (o_h < H)
    b_low, b_high = row_bounds(
        o_t, m_t, key_start + i_b * s_xb, key_end + i_b * s_yb, k_len - q_len, k_len, CAUSAL, RANGE
    )
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    p_q = q + i_b * s_qb + (o_t.to(tl.int64) * s_qn + o_h.to(tl.int64) * s_qh)[:, None]
    b_q = tl.load(p_q + o_d[None, :], mask=m_r[:, None] & m_d, other=0.0)
    p_w = weights + i_b * s_wb + o_t.to(tl.int64) * s_wn + o_h
    b_w = tl.load(p_w, mask=m_r, other=0.0)
    b_dq = tl.zeros([BT * BLOCK_H, BLOCK_D], tl.float32)
    b_dw = tl.zeros([BT * BLOCK_H], tl.float32)
    for n0 in range(tl.min(b_low, 0) // BN * BN, tl.max(b_high, 0), BN):
        o_n = n0 + tl.arange(0, BN)
        p_k = k + i_b * s_kb + o_n.to(tl.int64)[:, None] * s_kn + o_d[None, :]
        b_k = tl.load(p_k, mask=(o_n < k_len)[:, None] & m_d, other=0.0)  # [BN, D]
        m_seen = (o_n[None, :] >= b_low[:, None]) & (o_n[None, :] < b_high[:, None])
        p_g = dscores + (i_b * q_len + o_t)[:, None] * k_len + o_n[None, :]
        b_g = tl.load(p_g, mask=m_seen & m_r[:, None], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BT * BLOCK_H, BN]
        b_dw += tl.sum(b_g * tl.maximum(b_s, 0.0), 1)
        b_ds = tl.where(b_s > 0.0, b_g * b_w[:, None], 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)
    o_row = (i_b * q_len + o_t) * H + o_h
    p_dq = dq + o_row[:, None] * D + o_d[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_r[:, None] & m_d)
    tl.store(dweights + o_row, b_dw, mask=m_r)


@triton.jit(do_not_specialize=["q_len", "k_len", "s_wb", "s_wn", "s_xb", "s_yb"])
def score_backward_keys_kernel(
    dscores,
    q,
    k,
    weights,
    key_start,
    key_end,
    dk,
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_wb,
    s_wn,
    s_xb,
    s_yb,
    q_len,
    k_len,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
):
    """Grid ``(key tiles, batch)``: one program adds up what all queries give to its keys."""
    i_b = tl.program_id(1).to(tl.int64)
    n0 = tl.program_id(0) * BN
    o_n = n0 + tl.arange(0, BN)
    m_n = o_n < k_len
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    p_k = k + i_b * s_kb + o_n.to(tl.int64)[:, None] * s_kn + o_d[None, :]
    b_k = tl.load(p_k, mask=m_n[:, None] & m_d, other=0.0)  # [BN, D]
    b_dk = tl.zeros([BN, BLOCK_D], tl.float32)
    o_r = tl.arange(0, BT * BLOCK_H)
    o_h = o_r % BLOCK_H
    first = 0
    if CAUSAL:
        first = tl.maximum(n0 - (k_len - q_len), 0) // BT * BT
    for t0 in range(first, q_len, BT):
        o_t = t0 + o_r // BLOCK_H
        m_t = o_t < q_len
        m_r = m_t & (o_h < H)
        b_low, b_high = row_bounds(
            o_t, m_t, key_start + i_b * s_xb, key_end + i_b * s_yb, k_len - q_len, k_len, CAUSAL,
            RANGE,
        )  # fmt: skip
        p_q = q + i_b * s_qb + (o_t.to(tl.int64) * s_qn + o_h.to(tl.int64) * s_qh)[:, None]
        b_q = tl.load(p_q + o_d[None, :], mask=m_r[:, None] & m_d, other=0.0)
        p_w = weights + i_b * s_wb + o_t.to(tl.int64) * s_wn + o_h
        b_w = tl.load(p_w, mask=m_r, other=0.0)
        m_seen = (o_n[:, None] >= b_low[None, :]) & (o_n[:, None] < b_high[None, :])
        p_g = dscores + (i_b * q_len + o_t)[None, :] * k_len + o_n[:, None]
        b_g = tl.load(p_g, mask=m_seen & m_r[None, :], other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q))  # [BN, BT * BLOCK_H]
        b_ds = tl.where(b_s > 0.0, b_g * b_w[None, :], 0.0)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
    p_dk = dk + (i_b * k_len + o_n)[:, None] * D + o_d[None, :]
    tl.store(p_dk, b_dk.to(dk.dtype.element_ty), mask=m_n[:, None] & m_d)
