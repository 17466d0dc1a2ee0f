"""Phase 2 of Star Attention on one shard: query tokens over a span of keys, a part of the result.

The query heads of a KV head are packed into the rows of one tile (row ``r`` is token
``r // group`` of head ``r % group``), so that few query tokens still fill the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.online_softmax import add_tile, load_rows, sum_as_log

__all__ = ["star_query_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["batch", "q_len", "k_len", "span"])
def star_query_kernel(
    q,
    k,
    v,
    past_out,  # fp32 [B, Sq, Hq, Dv], read with RESUME
    past_lse,  # fp32 [B, Hq, Sq]
    out,  # [parts, B, Sq, Hq, Dv]
    lse,  # [parts, B, Hq, Sq]
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
    batch,
    units,  # batch * KV heads
    kv_heads,
    span,  # keys a part
    scale_log2,
    q_factor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    RESUME: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Grid ``(units * row tiles, parts)``; RESUME goes on from an earlier result."""
    i_t = tl.program_id(0) // units
    i_b = (tl.program_id(0) % units // kv_heads).to(tl.int64)
    i_h = (tl.program_id(0) % units % kv_heads).to(tl.int64)
    i_part = tl.program_id(1).to(tl.int64)
    heads = kv_heads * GROUP
    o_r = i_t * BM + tl.arange(0, BM)
    m_r = o_r < q_len * GROUP
    o_i = o_r // GROUP  # token
    o_h = i_h * GROUP + o_r % GROUP
    n0 = tl.program_id(1) * span
    n_end = tl.minimum(n0 + span, k_len)
    b_limit = tl.zeros([BM], tl.int32) + k_len  # last key that a row sees
    whole_end = n_end
    if CAUSAL:
        b_limit = o_i + k_len - q_len
        i_first = i_t * BM // GROUP
        whole_end = tl.minimum(n_end, i_first + k_len - q_len + 1)

    o_d = tl.arange(0, BLOCK_D)
    p_q = q + i_b * s_qb + (o_i.to(tl.int64) * s_qn + o_h * s_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    b_q = b_q.to(k.dtype.element_ty)  # [BM, D]
    o_v = tl.arange(0, BLOCK_DV)
    o_out = ((i_b * q_len + o_i) * heads + o_h) * DV
    o_lse = (i_b * heads + o_h) * q_len + o_i
    m_out = m_r[:, None] & (o_v < DV)[None, :]
    if RESUME:
        b_past = tl.load(past_lse + o_lse, mask=m_r, other=float("-inf"))
        b_m = b_past * LOG2_E
        b_l = tl.where(b_past == float("-inf"), 0.0, 1.0)
        b_acc = tl.load(past_out + o_out[:, None] + o_v[None, :], mask=m_out, other=0.0)
    else:
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, BLOCK_DV], tl.float32)

    p_k = k + i_b * s_kb + i_h * s_kh
    p_v = v + i_b * s_vb + i_h * s_vh
    for n in range(n0, n_end, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < n_end
        b_k = load_rows(p_k, o_n, s_kn, m_n, D, BLOCK_D)  # [BN, D]
        b_v = load_rows(p_v, o_n, s_vn, m_n, DV, BLOCK_DV)  # [BN, DV]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
        if SIGNED:
            b_s *= q_factor
        if n + BN > whole_end:
            keep = m_n[None, :] & (o_n[None, :] <= b_limit[:, None])
            b_s = tl.where(keep, b_s, float("-inf"))
        b_m, b_l, b_acc = add_tile(b_s, b_v, b_m, b_l, b_acc, scale_log2)

    rows = batch.to(tl.int64) * q_len * heads
    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    p_out = out + i_part * rows * DV + o_out[:, None] + o_v[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)
    tl.store(lse + i_part * rows + o_lse, sum_as_log(b_m, b_l), mask=m_r)
