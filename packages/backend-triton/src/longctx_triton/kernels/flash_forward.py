"""Exact attention forward with ``tl.dot``: FlashAttention-2 tiling, softmax in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.flash_tiles import (
    cap_scores,
    decode_e4m3,
    key_ranges,
    locate_sequence,
    pick_tile,
    visible_pairs,
)

__all__ = ["flash_forward_kernel"]

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    b_o, b_m, b_l, b_q, p_k, p_v, begin, end, positions, k_len, stride_ks, stride_vs,
    scale, score_scale, softcap, left, right,
    BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr, PRESCALED: tl.constexpr,
    FP8: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Fold the keys of ``[begin, end)`` into the running softmax of a tile of queries."""
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    for first in tl.range(begin, end, BLOCK_K):
        p_kk = p_k + first * stride_ks
        p_vv = p_v + first * stride_vs
        # [BLOCK_K, BLOCK_D], [BLOCK_K, BLOCK_V]
        if MASKED:
            m_k = (first + o_k < k_len)[:, None]
            b_k = tl.load(p_kk, mask=m_k & (o_d < HEAD_DIM)[None, :], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            b_k = tl.load(p_kk, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
        else:
            b_k = tl.load(p_kk)
        if FP8 == "bytes":
            b_k = decode_e4m3(b_k)
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BLOCK_Q, BLOCK_K], fp32
        if SOFTCAP:
            b_s = cap_scores(b_s, scale, softcap) * score_scale
        elif PRESCALED:
            b_s = b_s * score_scale
        if MASKED:
            keep = visible_pairs(
                positions[:, None], (first + o_k)[None, :], k_len, left, right, HAS_LEFT, HAS_RIGHT
            )
            b_s = tl.where(keep, b_s, float("-inf"))
        if PRESCALED:
            b_top = tl.maximum(b_m, tl.max(b_s, 1))
        else:
            b_top = tl.maximum(b_m, tl.max(b_s, 1) * score_scale)
        b_shift = b_top
        if MASKED:
            # a row that has seen nothing yet: -inf less -inf would be NaN
            b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
        if PRESCALED:
            b_p = tl.exp2(b_s - b_shift[:, None])
        else:
            b_p = tl.exp2(b_s * score_scale - b_shift[:, None])
        b_fade = tl.exp2(b_m - b_shift)
        b_l = b_l * b_fade + tl.sum(b_p, 1)
        b_o = b_o * b_fade[:, None]
        if MASKED:
            m_k = (first + o_k < k_len)[:, None]
            b_v = tl.load(p_vv, mask=m_k & (o_v < VALUE_DIM)[None, :], other=0.0)
        elif BLOCK_V != VALUE_DIM:
            b_v = tl.load(p_vv, mask=(o_v < VALUE_DIM)[None, :], other=0.0)
        else:
            b_v = tl.load(p_vv)
        if FP8 == "bytes":
            b_v = decode_e4m3(b_v)
        elif FP8 == "native":
            b_v = b_v.to(tl.float16)  # exact, and weights in e4m3 would cost three digits
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o)
        b_m = b_top
    return b_o, b_m, b_l


@triton.jit(
    do_not_specialize=[
        "q_len", "k_len", "sequences", "units", "q_heads", "group", "tiles", "section",
        "left", "right",
    ]
)  # fmt: skip
def flash_forward_kernel(
    q, k, v, out, lse, sinks, ends_q, ends_k, q_descale, k_descale, v_descale,
    scale, softcap, left, right,
    q_len, k_len, sequences, units, q_heads, group, tiles, section,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SOFTCAP: tl.constexpr, PRESCALED: tl.constexpr,
    FP8: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_Q queries of one head over all keys that it sees.

    Grid ``(tiles * units,)``. ``out [B, Sq, Hq, Dv]`` and ``lse [B, Hq, Sq]`` are contiguous;
    ``left``/``right`` are read where HAS_LEFT/HAS_RIGHT. FP8 is ``""``, ``"native"`` (e4m3
    tensors) or ``"bytes"`` (their bytes, for tensor cores without fp8).
    """
    tile, unit = pick_tile(tl.program_id(0), tiles, units, section, HAS_RIGHT)
    i_b = (unit // q_heads).to(tl.int64)
    i_h = unit % q_heads
    i_g = i_h // group
    row0, n_q, first_row, key0, n_k = locate_sequence(
        tile, ends_q, ends_k, sequences, q_len, k_len, BLOCK_Q, VARLEN
    )
    if first_row >= n_q:
        return

    o_q = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    o_k = tl.arange(0, BLOCK_K)
    m_q = first_row + o_q < n_q
    row = (row0 + first_row).to(tl.int64)  # of the packed tensor
    stride_ks = tl.cast(stride_ks, tl.int64)
    stride_vs = tl.cast(stride_vs, tl.int64)

    p_q = q + i_b * stride_qb + i_h.to(tl.int64) * stride_qh + row * stride_qs
    p_q = p_q + o_q[:, None] * tl.cast(stride_qs, tl.int64) + o_d[None, :]
    p_k = k + i_b * stride_kb + i_g.to(tl.int64) * stride_kh + key0 * stride_ks
    p_k = p_k + o_k[:, None] * stride_ks + o_d[None, :]
    p_v = v + i_b * stride_vb + i_g.to(tl.int64) * stride_vh + key0 * stride_vs
    p_v = p_v + o_k[:, None] * stride_vs + o_v[None, :]

    b_q = tl.load(p_q, mask=m_q[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    if FP8 == "bytes":
        b_q = decode_e4m3(b_q)
    factor = scale
    i_descale = i_b * (q_heads // group) + i_g
    if q_descale is not None:
        factor = factor * tl.load(q_descale + i_descale)
    if k_descale is not None:
        factor = factor * tl.load(k_descale + i_descale)
    score_scale = factor * _LOG2E
    if SOFTCAP:
        score_scale = softcap * _LOG2E

    b_m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)
    b_o = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    positions = first_row + o_q + (n_k - n_q)
    begin, inner_begin, inner_end, end = key_ranges(
        first_row, n_q, n_k, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
    )
    if HAS_LEFT:
        b_o, b_m, b_l = _attend(
            b_o, b_m, b_l, b_q, p_k, p_v, begin, inner_begin, positions, n_k, stride_ks, stride_vs,
            factor, score_scale, softcap, left, right, BLOCK_K, HEAD_DIM, VALUE_DIM, BLOCK_D,
            BLOCK_V, SOFTCAP, PRESCALED, FP8, True, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
    b_o, b_m, b_l = _attend(
        b_o, b_m, b_l, b_q, p_k, p_v, inner_begin, inner_end, positions, n_k, stride_ks, stride_vs,
        factor, score_scale, softcap, left, right, BLOCK_K, HEAD_DIM, VALUE_DIM, BLOCK_D,
        BLOCK_V, SOFTCAP, PRESCALED, FP8, False, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    b_o, b_m, b_l = _attend(
        b_o, b_m, b_l, b_q, p_k, p_v, inner_end, end, positions, n_k, stride_ks, stride_vs,
        factor, score_scale, softcap, left, right, BLOCK_K, HEAD_DIM, VALUE_DIM, BLOCK_D,
        BLOCK_V, SOFTCAP, PRESCALED, FP8, True, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip

    if sinks is not None:
        sink = tl.load(sinks + i_h) * _LOG2E
        b_top = tl.maximum(b_m, sink)
        b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_fade = tl.exp2(b_m - b_shift)
        b_l = b_l * b_fade + tl.exp2(sink - b_shift)
        b_o = b_o * b_fade[:, None]
        b_m = b_top
    # a row that saw nothing has b_l 0 and b_m -inf
    b_scale = 1.0 / tl.where(b_l == 0.0, 1.0, b_l)
    if v_descale is not None:
        b_scale = b_scale * tl.load(v_descale + i_descale)
    b_o = b_o * b_scale[:, None]
    b_lse = (b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l))) * _LN2

    head_row = (i_b * q_heads + i_h) * q_len + row
    tl.store(lse + head_row + o_q, b_lse, mask=m_q)
    stride_os = tl.cast(q_heads, tl.int64) * VALUE_DIM
    p_o = out + (i_b * q_len + row) * stride_os + i_h.to(tl.int64) * VALUE_DIM
    p_o = p_o + o_q[:, None] * stride_os + o_v[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_q[:, None] & (o_v < VALUE_DIM)[None, :])
