"""Attention of each query over the keys, or pages of keys, that a list names for it.

The query heads of a KV head are the rows of a tile, so a chosen key is gathered once for all of
them. Sizes that are no power of two are cut in two (MLA's 576 channels into 512 and 64); where the
values are the first part of the keys' memory they are not loaded again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.online_softmax import add_tile, load_rows, sum_as_log

__all__ = ["list_attention_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _chosen_tokens(p_list, o_s, s_end, k_len, position, PAGE: tl.constexpr):
    """Return the tokens of list slots ``o_s`` (a page has PAGE of them) and which count."""
    b_unit = tl.load(p_list + o_s // PAGE, mask=o_s < s_end, other=-1)
    b_token = b_unit * PAGE + o_s % PAGE
    m_token = (b_unit >= 0) & (b_unit < tl.cdiv(k_len, PAGE)) & (b_token < k_len)
    if PAGE > 1:
        m_token = m_token & (b_token <= position)
    return b_token, m_token


@triton.jit(do_not_specialize=["batch", "q_len", "k_len", "slots", "span"])
def list_attention_kernel(
    q,
    k,
    v,
    indices,  # int32 [B, Sq, G, K]
    sinks,  # fp32 [Hq], read with SINKS
    out,  # [parts, B, Sq, Hq, Dv]
    lse,  # fp32 [parts, B, Hq, Sq]
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
    s_in,
    s_ig,
    batch,
    q_len,
    k_len,
    kv_heads,
    head_tiles,
    lists,  # G: 1 or kv_heads
    slots,  # K * PAGE
    span,  # slots a part
    scale_log2,
    q_factor,
    GROUP: tl.constexpr,
    D: tl.constexpr,  # channels of the first part, whose tile has MAIN
    MAIN: tl.constexpr,
    REST: tl.constexpr,  # channels behind it
    BLOCK_REST: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    ONE_ROW: tl.constexpr,
    SINKS: tl.constexpr,
    LOOK: tl.constexpr,
):
    """Grid ``(batch * Sq * KV heads * head tiles, parts)``; the heads of a token run together."""
    i_t = tl.program_id(0) % head_tiles
    i_h = tl.program_id(0) // head_tiles % kv_heads
    i_token = (tl.program_id(0) // head_tiles // kv_heads).to(tl.int64)
    i_b = i_token // q_len
    i_i = i_token % q_len
    position = (i_i + k_len - q_len).to(tl.int32)
    o_g = i_t * BM + tl.arange(0, BM)
    m_g = o_g < GROUP
    o_h = (i_h * GROUP + o_g).to(tl.int64)
    p_list = indices + i_b * s_ib + i_i * s_in
    if lists > 1:
        p_list += i_h * s_ig

    # the part ends with its last slot that names anything
    s_first = tl.program_id(1) * span
    s_most = tl.minimum(s_first + span, slots)
    o_look = tl.arange(0, LOOK)
    b_end = tl.zeros([LOOK], tl.int32)
    for u0 in range(s_first // PAGE, tl.cdiv(s_most, PAGE), LOOK):
        o_u = u0 + o_look
        b_unit = tl.load(p_list + o_u, mask=o_u < tl.cdiv(s_most, PAGE), other=-1)
        b_end = tl.maximum(b_end, tl.where(b_unit >= 0, (o_u + 1) * PAGE, 0))
    s_end = tl.minimum(s_most, tl.max(b_end, 0))

    o_d = tl.arange(0, MAIN)
    p_q = q + i_b * s_qb + i_i * s_qn + o_h * s_qh
    m_q = m_g[:, None]
    if D < MAIN:
        m_q = m_q & (o_d < D)[None, :]
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
    b_q = b_q.to(k.dtype.element_ty)  # [BM, MAIN]
    if REST > 0:
        o_e = tl.arange(0, BLOCK_REST)
        m_e = m_g[:, None] & (o_e < REST)[None, :]
        b_qr = tl.load(p_q[:, None] + MAIN + o_e[None, :], mask=m_e, other=0.0)
        b_qr = b_qr.to(k.dtype.element_ty)  # [BM, BLOCK_REST]
    h64 = i_h.to(tl.int64)
    p_k = k + i_b * s_kb + h64 * s_kh
    p_v = v + i_b * s_vb + h64 * s_vh
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    for s0 in range(s_first, s_end, BN):
        o_s = s0 + tl.arange(0, BN)
        b_n, m_n = _chosen_tokens(p_list, o_s, s_end, k_len, position, PAGE)
        b_k = load_rows(p_k, b_n, s_kn, m_n, D, MAIN)  # [BN, MAIN]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
        if REST > 0:
            b_kr = load_rows(p_k + MAIN, b_n, s_kn, m_n, REST, BLOCK_REST)
            b_s = tl.dot(b_qr, tl.trans(b_kr), b_s)
        b_s = tl.where(m_n[None, :], b_s * q_factor, float("-inf"))
        b_v = b_k if ONE_ROW else load_rows(p_v, b_n, s_vn, m_n, DV, BLOCK_DV)  # [BN, DV]
        b_m, b_l, b_acc = add_tile(b_s, b_v, b_m, b_l, b_acc, scale_log2)

    if SINKS:
        b_empty = b_m == float("-inf")
        b_logit = tl.load(sinks + o_h, mask=m_g, other=0.0).to(tl.float32)
        b_sink = b_logit * LOG2_E
        b_top = tl.maximum(b_m, b_sink)
        b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_fade = tl.exp2(b_m - b_shift)
        b_l = b_l * b_fade + tl.exp2(b_sink - b_shift)
        b_acc = b_acc * b_fade[:, None]
        b_m = b_top
    heads = kv_heads * GROUP
    rows = batch.to(tl.int64) * q_len * heads * tl.program_id(1)
    o_v = tl.arange(0, BLOCK_DV)
    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    p_out = out + (rows + i_token * heads + o_h)[:, None] * DV + o_v[None, :]
    m_out = m_g[:, None] & (o_v < DV)[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)
    o_lse = rows + (i_b * heads + o_h) * q_len + i_i
    b_lse = sum_as_log(b_m, b_l)
    if SINKS:
        # a row without keys has the sink's own bits, which base 2 would round
        b_lse = tl.where(b_empty, b_logit, b_lse)
    tl.store(lse + o_lse, b_lse, mask=m_g)
