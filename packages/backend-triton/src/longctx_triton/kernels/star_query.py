"""Phase 2 of Star Attention: query tokens over a span of a shard's keys, a part of the result.

The query heads of a KV head are packed into the rows of one tile (row ``r`` is token
``r // group`` of head ``r % group``), so that few query tokens still fill the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.online_softmax import add_tile, load_rows, sum_as_log

__all__ = ["star_query_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=[
        "batch", "q_len", "k_len", "k_len1", "k_len2", "k_len3", "part0", "part1", "part2",
        "part3", "span",
    ]
)  # fmt: skip
def star_query_kernel(
    q,
    k,
    v,
    k1,  # with SHARDS > 1: the next shards, of the same strides
    v1,
    k2,
    v2,
    k3,
    v3,
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
    k_len1,
    k_len2,
    k_len3,
    part0,  # parts before the first of this launch
    part1,  # parts of this launch before those of each further shard
    part2,
    part3,
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
    SHARDS: tl.constexpr,
    CAUSAL: tl.constexpr,  # the shard in which attention is causal; -1 for none of these
    RESUME: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Grid ``(units * row tiles, parts)``; RESUME goes on from an earlier result.

    The parts of one shard follow those of the one before.
    """
    i_t = tl.program_id(0) // units
    i_b = (tl.program_id(0) % units // kv_heads).to(tl.int64)
    i_h = (tl.program_id(0) % units % kv_heads).to(tl.int64)
    i_part = part0.to(tl.int64) + tl.program_id(1)
    i_own = tl.program_id(1)  # part of the shard
    i_shard = 0
    if SHARDS > 1:  # noqa: SIM102 (one is known to the compiler)
        if tl.program_id(1) >= part1:
            k = k1
            v = v1
            k_len = k_len1
            i_own = tl.program_id(1) - part1
            i_shard = 1
    if SHARDS > 2:  # noqa: SIM102 (one is known to the compiler)
        if tl.program_id(1) >= part2:
            k = k2
            v = v2
            k_len = k_len2
            i_own = tl.program_id(1) - part2
            i_shard = 2
    if SHARDS > 3:  # noqa: SIM102 (one is known to the compiler)
        if tl.program_id(1) >= part3:
            k = k3
            v = v3
            k_len = k_len3
            i_own = tl.program_id(1) - part3
            i_shard = 3
    heads = kv_heads * GROUP
    o_r = i_t * BM + tl.arange(0, BM)
    m_r = o_r < q_len * GROUP
    o_i = o_r // GROUP  # token
    o_h = i_h * GROUP + o_r % GROUP
    n0 = i_own * span
    n_end = tl.minimum(n0 + span, k_len)
    b_limit = tl.zeros([BM], tl.int32) + k_len  # last key that a row sees
    whole_end = n_end
    if CAUSAL >= 0:  # noqa: SIM102 (one is known to the compiler)
        if i_shard == CAUSAL:
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
