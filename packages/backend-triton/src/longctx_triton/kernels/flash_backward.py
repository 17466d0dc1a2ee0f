"""Gradient of exact attention with ``tl.dot``: delta, then dq, and dk with dv, without atomics.

FlashAttention-2 (arXiv 2307.08691, algorithm 2), split so that every sum has one owner: the
kernel of dq walks over keys, that of dk and dv over the queries of a whole group of heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.flash_tiles import (
    cap_scores,
    key_ranges,
    locate_sequence,
    pick_tile,
    row_ranges,
    visible_pairs,
)

__all__ = ["flash_delta_kernel", "flash_dkdv_kernel", "flash_dq_kernel"]

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["q_len", "padded", "units", "q_heads"])
def flash_delta_kernel(
    dout, out, lse, dlse, sinks, delta, lse2, dsinks, q_len, padded, units, q_heads,
    stride_db, stride_ds, stride_dh, stride_ob, stride_os, stride_oh,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Write ``delta = dout . out - dlse`` and ``lse log2(e)``, both ``[B, Hq, padded]`` fp32.

    An empty row gets +inf, so that its weights ``exp2(score - lse2)`` vanish, and so does one
    past the end (there are ``padded - q_len``, less than a tile). Grid ``(row tiles *
    units,)``, units being ``B * Hq``; each program leaves its part of dsinks in ``[row tiles, B,
    Hq]``.
    """
    i_t = tl.program_id(0) // units
    i_bh = tl.program_id(0) % units
    i_b = (i_bh // q_heads).to(tl.int64)
    i_h = (i_bh % q_heads).to(tl.int64)
    o_q = i_t * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_v = tl.arange(0, BLOCK_V)
    m_q = o_q < q_len
    m_qv = m_q[:, None] & (o_v < VALUE_DIM)[None, :]
    rows = o_q.to(tl.int64)[:, None]
    p_dout = dout + i_b * stride_db + i_h * stride_dh + rows * stride_ds + o_v[None, :]
    p_out = out + i_b * stride_ob + i_h * stride_oh + rows * stride_os + o_v[None, :]
    b_dout = tl.load(p_dout, mask=m_qv, other=0).to(tl.float32)  # [BLOCK_Q, BLOCK_V]
    b_out = tl.load(p_out, mask=m_qv, other=0).to(tl.float32)
    o_row = i_bh.to(tl.int64) * q_len + o_q
    b_delta = tl.sum(b_dout * b_out, 1)
    if dlse is not None:
        b_delta = b_delta - tl.load(dlse + o_row, mask=m_q, other=0)
    b_lse = tl.load(lse + o_row, mask=m_q, other=float("-inf"))
    b_lse2 = tl.where(b_lse == float("-inf"), float("inf"), b_lse * _LOG2E)
    o_padded = i_bh.to(tl.int64) * padded + o_q
    tl.store(delta + o_padded, b_delta, mask=o_q < padded)
    tl.store(lse2 + o_padded, b_lse2, mask=o_q < padded)
    if sinks is not None:
        # a sink is a key with value 0
        b_p = tl.exp2(tl.load(sinks + i_h) * _LOG2E - b_lse2)
        tl.store(dsinks + tl.program_id(0), -tl.sum(b_p * b_delta, 0))


@triton.jit
def _weights(b_s, b_lse2, scale, softcap, SOFTCAP: tl.constexpr):
    """Return P of raw scores and the slope of the softcap there; ``b_lse2`` is broadcastable."""
    if SOFTCAP:
        b_t = cap_scores(b_s, scale, softcap)
        b_p = tl.exp2(b_t * (softcap * _LOG2E) - b_lse2)
        b_slope = 1.0 - b_t * b_t
    else:
        b_p = tl.exp2(b_s * (scale * _LOG2E) - b_lse2)
        b_slope = 1.0
    return b_p, b_slope


@triton.jit
def _sum_over_keys(
    b_dq, b_q, b_dout, b_lse2, b_delta, p_k, p_v, begin, end, positions, k_len,
    stride_ks, stride_vs, scale, softcap, left, right,
    BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    for first in tl.range(begin, end, BLOCK_K):
        p_kk = p_k + first * stride_ks
        p_vv = p_v + first * stride_vs
        # [BLOCK_K, BLOCK_D], [BLOCK_K, BLOCK_V]
        if MASKED:
            m_k = (first + o_k < k_len)[:, None]
            b_k = tl.load(p_kk, mask=m_k & (o_d < HEAD_DIM)[None, :], other=0)
            b_v = tl.load(p_vv, mask=m_k & (o_v < VALUE_DIM)[None, :], other=0)
        else:
            b_k = tl.load(p_kk, mask=(o_d < HEAD_DIM)[None, :], other=0)
            b_v = tl.load(p_vv, mask=(o_v < VALUE_DIM)[None, :], other=0)
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BLOCK_Q, BLOCK_K]
        b_dp = tl.dot(b_dout, tl.trans(b_v))
        b_p, b_slope = _weights(b_s, b_lse2[:, None], scale, softcap, SOFTCAP)
        if MASKED:
            keep = visible_pairs(
                positions[:, None], (first + o_k)[None, :], k_len, left, right, HAS_LEFT, HAS_RIGHT
            )
            b_p = tl.where(keep, b_p, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None]) * b_slope
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit(
    do_not_specialize=[
        "q_len", "k_len", "sequences", "units", "q_heads", "group", "tiles", "section",
        "left", "right",
    ]
)  # fmt: skip
def flash_dq_kernel(
    dout, q, k, v, lse2, delta, dq, ends_q, ends_k, scale, softcap, left, right,
    q_len, k_len, sequences, units, q_heads, group, tiles, section,
    stride_db, stride_ds, stride_dh, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Sum ``dq = scale dS k`` of one tile of queries. Grid and tiles are the forward's."""
    tile, unit = pick_tile(tl.program_id(0), tiles, units, section, HAS_RIGHT)
    i_b = (unit // q_heads).to(tl.int64)
    i_h = (unit % q_heads).to(tl.int64)
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
    m_qd = m_q[:, None] & (o_d < HEAD_DIM)[None, :]
    m_qv = m_q[:, None] & (o_v < VALUE_DIM)[None, :]
    rows = ((row0 + first_row).to(tl.int64) + o_q)[:, None]  # of the packed tensor
    stride_ks = tl.cast(stride_ks, tl.int64)
    stride_vs = tl.cast(stride_vs, tl.int64)
    p_q = q + i_b * stride_qb + i_h * stride_qh + rows * stride_qs + o_d[None, :]
    p_dout = dout + i_b * stride_db + i_h * stride_dh + rows * stride_ds + o_v[None, :]
    p_k = k + i_b * stride_kb + i_g * stride_kh + key0 * stride_ks
    p_k = p_k + o_k[:, None] * stride_ks + o_d[None, :]
    p_v = v + i_b * stride_vb + i_g * stride_vh + key0 * stride_vs
    p_v = p_v + o_k[:, None] * stride_vs + o_v[None, :]
    b_q = tl.load(p_q, mask=m_qd, other=0)
    b_dout = tl.load(p_dout, mask=m_qv, other=0)
    o_row = (i_b * q_heads + i_h) * q_len + (row0 + first_row) + o_q
    b_lse2 = tl.load(lse2 + o_row, mask=m_q, other=float("inf"))
    b_delta = tl.load(delta + o_row, mask=m_q, other=0)

    positions = first_row + o_q + (n_k - n_q)
    begin, inner_begin, inner_end, end = key_ranges(
        first_row, n_q, n_k, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
    )
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if HAS_LEFT:
        b_dq = _sum_over_keys(
            b_dq, b_q, b_dout, b_lse2, b_delta, p_k, p_v, begin, inner_begin, positions, n_k,
            stride_ks, stride_vs, scale, softcap, left, right, BLOCK_K, HEAD_DIM, VALUE_DIM,
            BLOCK_D, BLOCK_V, SOFTCAP, True, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
    b_dq = _sum_over_keys(
        b_dq, b_q, b_dout, b_lse2, b_delta, p_k, p_v, inner_begin, inner_end, positions, n_k,
        stride_ks, stride_vs, scale, softcap, left, right, BLOCK_K, HEAD_DIM, VALUE_DIM,
        BLOCK_D, BLOCK_V, SOFTCAP, False, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    b_dq = _sum_over_keys(
        b_dq, b_q, b_dout, b_lse2, b_delta, p_k, p_v, inner_end, end, positions, n_k,
        stride_ks, stride_vs, scale, softcap, left, right, BLOCK_K, HEAD_DIM, VALUE_DIM,
        BLOCK_D, BLOCK_V, SOFTCAP, True, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    p_dq = dq + ((i_b * q_len + rows) * q_heads + i_h) * HEAD_DIM + o_d[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_qd)


@triton.jit(
    do_not_specialize=[
        "q_len", "k_len", "sequences", "units", "kv_heads", "group", "tiles", "section",
        "left", "right",
    ]
)  # fmt: skip
def flash_dkdv_kernel(
    dout, q, k, v, lse2, delta, dk, dv, ends_q, ends_k, scale, softcap, left, right,
    q_len, k_len, sequences, units, kv_heads, group, tiles, section,
    stride_db, stride_ds, stride_dh, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Sum ``dv = P^T dout`` and ``dk = scale dS^T q`` of one tile of keys over its query group.

    Grid ``(tiles * units,)``; tiles are of keys, units are batch times KV heads.
    """
    tile, unit = pick_tile(tl.program_id(0), tiles, units, section, False)
    i_b = (unit // kv_heads).to(tl.int64)
    i_g = (unit % kv_heads).to(tl.int64)
    key0, n_k, first_key, row0, n_q = locate_sequence(
        tile, ends_k, ends_q, sequences, k_len, q_len, BLOCK_K, VARLEN
    )
    if first_key >= n_k:
        return

    o_q = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    o_key = first_key + tl.arange(0, BLOCK_K)
    m_kd = (o_key < n_k)[:, None] & (o_d < HEAD_DIM)[None, :]
    m_kv = (o_key < n_k)[:, None] & (o_v < VALUE_DIM)[None, :]
    keys = (tl.cast(key0, tl.int64) + o_key)[:, None]  # of the packed tensor
    p_k = k + i_b * stride_kb + i_g * stride_kh + keys * stride_ks + o_d[None, :]
    p_v = v + i_b * stride_vb + i_g * stride_vh + keys * stride_vs + o_v[None, :]
    b_k = tl.load(p_k, mask=m_kd, other=0)
    b_v = tl.load(p_v, mask=m_kv, other=0)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    begin, inner_begin, inner_end, end = row_ranges(
        first_key, n_q, n_k, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
    )
    stride_qs = tl.cast(stride_qs, tl.int64)
    stride_qh = tl.cast(stride_qh, tl.int64)
    stride_ds = tl.cast(stride_ds, tl.int64)
    stride_dh = tl.cast(stride_dh, tl.int64)
    p_q = q + i_b * stride_qb + i_g * group * stride_qh + row0 * stride_qs
    p_q = p_q + o_q[:, None] * stride_qs + o_d[None, :]
    p_dout = dout + i_b * stride_db + i_g * group * stride_dh + row0 * stride_ds
    p_dout = p_dout + o_q[:, None] * stride_ds + o_v[None, :]
    first_o_row = (i_b * kv_heads + i_g) * group * q_len + row0
    # one loop over all members of the group: the next one's loads overlap the last one's products
    blocks = tl.cdiv(end - begin, BLOCK_Q)
    for step in tl.range(0, group * blocks):
        member = step // blocks
        first = begin + step % blocks * BLOCK_Q
        m_q = first + o_q < n_q
        # [BLOCK_Q, BLOCK_D], [BLOCK_Q, BLOCK_V], [BLOCK_Q]
        p_qq = p_q + (member * stride_qh + first * stride_qs)
        p_dd = p_dout + (member * stride_dh + first * stride_ds)
        b_q = tl.load(p_qq, mask=m_q[:, None] & (o_d < HEAD_DIM)[None, :], other=0)
        b_dout = tl.load(p_dd, mask=m_q[:, None] & (o_v < VALUE_DIM)[None, :], other=0)
        o_row = first_o_row + tl.cast(member, tl.int64) * q_len + first
        b_lse2 = tl.load(lse2 + o_row + o_q, mask=m_q, other=float("inf"))
        b_delta = tl.load(delta + o_row + o_q, mask=m_q, other=0)
        b_s = tl.dot(b_k, tl.trans(b_q))  # [BLOCK_K, BLOCK_Q]
        b_dp = tl.dot(b_v, tl.trans(b_dout))
        b_p, b_slope = _weights(b_s, b_lse2[None, :], scale, softcap, SOFTCAP)
        if HAS_LEFT or HAS_RIGHT:  # noqa: SIM102 (known when compiling, the next one is not)
            if (first < inner_begin) | (first >= inner_end):
                positions = first + o_q + (n_k - n_q)
                keep = visible_pairs(
                    positions[None, :], o_key[:, None], n_k, left, right, HAS_LEFT, HAS_RIGHT
                )
                b_p = tl.where(keep, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv)
        b_ds = b_p * (b_dp - b_delta[None, :]) * b_slope
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
    o_out = (i_b * k_len + keys) * kv_heads + i_g
    tl.store(
        dk + o_out * HEAD_DIM + o_d[None, :], (b_dk * scale).to(dk.dtype.element_ty), mask=m_kd
    )
    tl.store(dv + o_out * VALUE_DIM + o_v[None, :], b_dv.to(dv.dtype.element_ty), mask=m_kv)
