"""The lightning indexer: scores of a tile of keys for a few queries, all index heads at once.

``I[t, s] = k_scale[s] sum_h weights[t, h] relu(q[t, h] . k[s])``. Keys are the rows of the
product, so that the sum over heads stays within a row of the accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["index_score_kernel", "row_bounds", "wide_fp8"]


@triton.jit
def wide_fp8(b_codes):
    """Return e4m3 codes (uint8) as fp16, exactly: exponent and mantissa moved, times 2**8."""
    b_bits = b_codes.to(tl.int16)
    b_wide = ((b_bits & 0x80) << 8) | ((b_bits & 0x7F) << 7)
    b_value = b_wide.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    b_value = tl.where((b_bits & 0x7F) == 0x7F, float("nan"), b_value.to(tl.float32))
    return b_value.to(tl.float16)


@triton.jit
def row_bounds(o_t, m_t, p_start, p_end, shift, k_len, CAUSAL: tl.constexpr, RANGE: tl.constexpr):
    """Return ``[low, high)``, the keys that query rows ``o_t`` see."""
    b_low = tl.zeros(o_t.shape, tl.int32)
    b_high = tl.where(m_t, k_len, 0)
    if CAUSAL:
        b_high = tl.minimum(b_high, tl.maximum(o_t + shift + 1, 0))
    if RANGE:
        b_low = tl.maximum(tl.load(p_start + o_t, mask=m_t, other=0), 0)
        b_high = tl.minimum(b_high, tl.load(p_end + o_t, mask=m_t, other=0))
    return b_low, b_high


@triton.jit(
    do_not_specialize=[
        "b_first", "t_first", "t_end", "shift", "k_len", "width", "stride", "span", "s_wb", "s_wn",
        "s_cb", "s_xb", "s_yb",
    ]
)  # fmt: skip
def index_score_kernel(
    q,  # [B, Sq, H, D]
    k,  # [B, Sk, D]
    weights,  # fp32 [B, Sq, H]
    k_scale,  # fp32 [B, Sk], read with SCALE
    key_start,  # int32 [B, Sq], read with RANGE
    key_end,
    out,  # fp32 [batches, t_end - t_first, stride]
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_wb,
    s_wn,
    s_cb,
    s_xb,
    s_yb,
    b_first,
    t_first,
    t_end,
    shift,  # position of query 0
    k_len,
    width,
    stride,
    span,  # keys a program
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
    SCALE: tl.constexpr,
    UNPACK: tl.constexpr,
    FILL: tl.constexpr,
):
    """Grid ``(query tiles, key spans, batches)``; UNPACK widens e4m3 codes to fp16.

    What is not seen becomes -inf; without FILL, tiles that no row of a program sees are not
    written at all.
    """
    i_b = (b_first + tl.program_id(2)).to(tl.int64)
    t0 = t_first + (tl.num_programs(0) - 1 - tl.program_id(0)) * BT
    o_t = t0 + tl.arange(0, BT)
    m_t = o_t < t_end
    b_low, b_high = row_bounds(
        o_t, m_t, key_start + i_b * s_xb, key_end + i_b * s_yb, shift, k_len, CAUSAL, RANGE
    )
    n_first = tl.program_id(1) * span
    n_end = tl.minimum(n_first + span, width)
    if not FILL:
        n_end = tl.minimum(n_end, tl.max(b_high, 0))
        n_first = tl.maximum(n_first, tl.min(b_low, 0) // BN * BN)
    if n_first >= n_end:
        return

    o_r = tl.arange(0, BT * BLOCK_H)
    o_rt = t0 + o_r // BLOCK_H
    o_rh = o_r % BLOCK_H
    m_r = (o_rt < t_end) & (o_rh < H)
    o_d = tl.arange(0, BLOCK_D)
    p_q = q + i_b * s_qb + (o_rt.to(tl.int64) * s_qn + o_rh.to(tl.int64) * s_qh)[:, None]
    m_q = m_r[:, None]
    if D != BLOCK_D:
        m_q = m_q & (o_d < D)[None, :]
    if UNPACK:
        b_q = wide_fp8(tl.load(p_q + o_d[None, :], mask=m_q, other=0))
    else:
        b_q = tl.load(p_q + o_d[None, :], mask=m_q, other=0.0)  # [BT * BLOCK_H, D]
    p_w = weights + i_b * s_wb + o_rt.to(tl.int64) * s_wn + o_rh
    b_w = tl.load(p_w, mask=m_r, other=0.0)
    b_qt = tl.trans(b_q)

    for n0 in range(n_first, n_end, BN):
        o_n = n0 + tl.arange(0, BN)
        m_n = o_n < k_len
        m_k = m_n[:, None]
        if D != BLOCK_D:
            m_k = m_k & (o_d < D)[None, :]
        p_k = k + i_b * s_kb + o_n.to(tl.int64)[:, None] * s_kn + o_d[None, :]
        if UNPACK:
            b_k = wide_fp8(tl.load(p_k, mask=m_k, other=0))
        else:
            b_k = tl.load(p_k, mask=m_k, other=0.0)  # [BN, D]
        b_s = tl.dot(b_k, b_qt)  # [BN, BT * BLOCK_H]
        b_s = tl.maximum(b_s, 0.0, propagate_nan=tl.PropagateNan.ALL) * b_w[None, :]
        b_i = tl.sum(tl.reshape(b_s, [BN, BT, BLOCK_H]), 2)  # [BN, BT]
        if SCALE:
            b_i *= tl.load(k_scale + i_b * s_cb + o_n, mask=m_n, other=0.0)[:, None]
        m_seen = (o_n[:, None] >= b_low[None, :]) & (o_n[:, None] < b_high[None, :])
        b_i = tl.where(m_seen, b_i, float("-inf"))
        o_row = tl.program_id(2).to(tl.int64) * (t_end - t_first) + (o_t - t_first)
        p_out = out + o_row[None, :] * stride + o_n[:, None]
        tl.store(p_out, b_i, mask=(o_n < width)[:, None] & m_t[None, :])
