"""How much attention the last queries give to each earlier token: two passes over the keys.

The first finds the log-sum-exp of each query row, cut over the keys; the second, with the keys as
the rows of its tiles, sums the queries' shares in registers. Neither repeats a KV head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.online_softmax import load_rows

__all__ = ["merge_statistics_kernel", "pool_kernel", "share_kernel", "statistics_kernel"]


@triton.jit(do_not_specialize=["window", "k_len", "span"])
def statistics_kernel(
    q,  # [B, W, Hq, D]
    k,  # [B, Sk, Hkv, D]
    sums,  # fp32 [B, Hq, parts, W]: log2-sum-exp over the keys of each part
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_kh,
    window,
    k_len,
    units,  # batch * KV heads
    kv_heads,
    span,  # keys a part
    scale_log2,
    q_factor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid ``(units * row tiles, parts)``; row ``r``: query ``r // GROUP``, head ``r % GROUP``."""
    i_t = tl.program_id(0) // units
    i_b = (tl.program_id(0) % units // kv_heads).to(tl.int64)
    i_h = (tl.program_id(0) % units % kv_heads).to(tl.int64)
    o_r = i_t * BM + tl.arange(0, BM)
    m_r = o_r < window * GROUP
    o_i = o_r // GROUP
    o_h = i_h * GROUP + o_r % GROUP
    b_limit = k_len - window + o_i  # the last key that a row sees
    whole_end = k_len - window + i_t * BM // GROUP + 1

    o_d = tl.arange(0, BLOCK_D)
    p_q = q + i_b * s_qb + (o_i.to(tl.int64) * s_qn + o_h * s_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    b_q = (b_q.to(tl.float32) * q_factor).to(k.dtype.element_ty)  # [BM, D]
    p_k = k + i_b * s_kb + i_h * s_kh
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    n_first = tl.program_id(1) * span
    n_end = tl.minimum(n_first + span, k_len)
    for n0 in range(n_first, n_end, BN):
        o_n = n0 + tl.arange(0, BN)
        m_n = o_n < n_end
        b_k = load_rows(p_k, o_n, s_kn, m_n, D, BLOCK_D)  # [BN, D]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
        if n0 + BN > tl.minimum(whole_end, n_end):
            keep = m_n[None, :] & (o_n[None, :] <= b_limit[:, None])
            b_s = tl.where(keep, b_s, float("-inf"))
        b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
        b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_l = b_l * tl.exp2(b_m - b_shift) + tl.sum(b_p, 1)
        b_m = b_top
    b_sum = tl.where(b_l == 0.0, float("-inf"), b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l)))
    p_sum = sums + (i_b * kv_heads * GROUP + o_h) * tl.num_programs(1) * window
    tl.store(p_sum + tl.program_id(1) * window + o_i, b_sum, mask=m_r)


@triton.jit(do_not_specialize=["window", "parts"])
def merge_statistics_kernel(sums, totals, window, parts, BLOCK_W: tl.constexpr):
    """Grid ``(batch * heads,)``: ``totals [B, Hq, W]`` of ``sums [B, Hq, parts, W]``, in log2."""
    i_row = tl.program_id(0).to(tl.int64)
    for w0 in range(0, window, BLOCK_W):
        o_w = w0 + tl.arange(0, BLOCK_W)
        m_w = o_w < window
        p_sum = sums + i_row * parts * window + o_w
        b_top = tl.full([BLOCK_W], float("-inf"), tl.float32)
        for i in range(0, parts):
            b_sum = tl.load(p_sum + i * window, mask=m_w, other=float("-inf"))
            b_top = tl.maximum(b_top, b_sum)
        b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_l = tl.zeros([BLOCK_W], tl.float32)
        for i in range(0, parts):
            b_sum = tl.load(p_sum + i * window, mask=m_w, other=float("-inf"))
            b_l += tl.exp2(b_sum - b_shift)
        tl.store(totals + i_row * window + o_w, b_shift + tl.log2(b_l), mask=m_w)


@triton.jit(do_not_specialize=["window", "prefix"])
def share_kernel(
    q,
    k,
    totals,  # fp32 [B, Hq, W], log2
    shares,  # fp32 [B, Hq, prefix]
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kn,
    s_kh,
    window,
    prefix,
    units,  # batch * KV heads
    kv_heads,
    scale_log2,
    q_factor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid ``(units * key tiles,)``: the mean over the queries of what a key gets of each."""
    i_t = tl.program_id(0) // units
    i_b = (tl.program_id(0) % units // kv_heads).to(tl.int64)
    i_h = (tl.program_id(0) % units % kv_heads).to(tl.int64)
    o_n = i_t * BN + tl.arange(0, BN)
    m_n = o_n < prefix
    b_k = load_rows(k + i_b * s_kb + i_h * s_kh, o_n, s_kn, m_n, D, BLOCK_D)  # [BN, D]
    tiles = tl.cdiv(window, BW)
    b_share = tl.zeros([BN], tl.float32)
    for i in range(0, GROUP * tiles):
        i_q = i_h * GROUP + i // tiles
        o_w = i % tiles * BW + tl.arange(0, BW)
        m_w = o_w < window
        b_q = load_rows(q + i_b * s_qb + i_q * s_qh, o_w, s_qn, m_w, D, BLOCK_D)
        b_q = (b_q.to(tl.float32) * q_factor).to(k.dtype.element_ty)  # [BW, D]
        i_row = i_b * kv_heads * GROUP + i_q
        b_total = tl.load(totals + i_row * window + o_w, mask=m_w, other=float("inf"))
        b_s = tl.dot(b_k, tl.trans(b_q))  # [BN, BW]
        b_share += tl.sum(tl.exp2(b_s * scale_log2 - b_total[None, :]), 1)
        if i % tiles == tiles - 1:
            tl.store(shares + i_row * prefix + o_n, b_share / window, mask=m_n)
            b_share = tl.zeros([BN], tl.float32)


@triton.jit(do_not_specialize=["prefix"])
def pool_kernel(shares, scores, prefix, POOL: tl.constexpr, BLOCK: tl.constexpr):
    """Grid ``(batch * heads, chunks)``: means of POOL neighbours; zeros beyond the ends count."""
    i_row = tl.program_id(0).to(tl.int64) * prefix
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(POOL):
        o_i = o_n + i - POOL // 2
        b_sum += tl.load(shares + i_row + o_i, mask=(o_i >= 0) & (o_i < prefix), other=0.0)
    tl.store(scores + i_row + o_n, b_sum / POOL, mask=o_n < prefix)
