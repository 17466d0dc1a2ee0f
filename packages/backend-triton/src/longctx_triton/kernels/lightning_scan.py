"""Chunked scan of linear attention with a fixed decay a head, forwards or backwards in time.

With ``w = exp(log_decay)``, ``m`` rows in a chunk and row ``i`` counting from 0, one step is
``o_i = w^(i+1) q_i S + sum_{j<=i} w^(i-j) (q_i . k_j) v_j`` and
``S <- w^m S + sum_i w^(m-1-i) k_i^T v_i`` (arXiv 2401.04658, algorithm 1). Backwards in time ``S``
is the gradient of the state after the chunk, and the two row factors change places. Every decay
exponent is at most 0. The state stays in fp32 registers; only the tensor cores' copy is rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.leading_power import leading_power

__all__ = ["decay_rate", "lightning_scan_kernel", "lightning_state_kernel", "power"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def decay_rate(log_decay, i_h):
    """Return a head's log decay; below -1e4 nothing is left of the next token's state anyway."""
    return tl.maximum(tl.load(log_decay + i_h).to(tl.float32), -1e4)


@triton.jit
def power(b_g, steps):
    """Return ``exp(b_g steps)``.

    Factors near 1 are multiplied chunk after chunk, which the fast exponential's error of 2^-22
    would not survive: a series is exact to the last bit there.
    """
    x = b_g * steps
    series = 1.0 + x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))
    return tl.where(x > -0.03125, series, tl.exp2(x * LOG2E))


@triton.jit
def locate(cu_seqlens, i_n, length):
    """Return batch entry, first token and length of sequence ``i_n``, packed or not."""
    if cu_seqlens is not None:
        i_b = 0
        start = tl.load(cu_seqlens + i_n)
        length = tl.load(cu_seqlens + i_n + 1) - start
    else:
        i_b = i_n
        start = 0
    return i_b, start, length


@triton.jit
def count_segments(chunks, segments, least_chunks):
    """Return into how many segments a sequence is cut: one if it is short."""
    return tl.maximum(tl.minimum(segments, tl.cdiv(chunks, least_chunks)), 1)


@triton.jit
def load_rows(p_x, o_t, stride_t, length, o_d, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows ``o_t`` of a sequence ``[BLOCK_T, BLOCK]``, 0 outside of it."""
    p_x = p_x + o_t.to(tl.int64)[:, None] * stride_t + o_d[None, :]
    mask = (o_t < length)[:, None]
    if DIM % BLOCK != 0:
        mask = mask & (o_d < DIM)[None, :]
    return tl.load(p_x, mask=mask, other=0.0)


@triton.jit
def advance(b_s, b_k, b_v, b_weight, b_whole, EXACT: tl.constexpr):
    """Carry the state ``[K, V]`` over a chunk ``k [T, K]``, ``v [T, V]``."""
    b_wide = b_v.to(tl.float32) * b_weight[:, None]
    b_s = b_s * b_whole
    if EXACT:
        # decayed values as a sum of two: their leading bits, and what those leave
        LEADING: tl.constexpr = -65536 if b_v.dtype == tl.bfloat16 else -8192
        b_high = (b_wide.to(tl.int32, bitcast=True) & LEADING).to(tl.float32, bitcast=True)
        b_s = tl.dot(tl.trans(b_k), (b_wide - b_high).to(b_v.dtype), acc=b_s)
        b_wide = b_high
    return tl.dot(tl.trans(b_k), b_wide.to(b_v.dtype), acc=b_s)


@triton.jit
def against_state(b_q, b_s):
    """Return ``q S [T, V]``, the state rounded to the queries' type."""
    if b_q.dtype == tl.bfloat16:
        return tl.dot(b_q, b_s.to(tl.bfloat16))
    else:
        # a state sums over many tokens and may leave fp16's range
        b_unit = leading_power(tl.max(tl.abs(b_s)))
        return tl.dot(b_q, (b_s * (1.0 / b_unit)).to(b_q.dtype)) * b_unit


@triton.jit
def row_weights(b_g, o_i, rows, scale, REVERSE: tl.constexpr):
    """Return the factors of a chunk's rows into the state after it, ``[BLOCK_T]``."""
    if REVERSE:
        return tl.exp2(b_g * LOG2E * (o_i + 1)) * scale
    else:
        return tl.exp2(b_g * LOG2E * tl.maximum(rows - 1 - o_i, 0))


@triton.jit(do_not_specialize=["length", "segments", "least_chunks"])
def lightning_state_kernel(
    k,
    v,
    log_decay,
    cu_seqlens,
    local,
    scale,
    length,
    heads,
    segments,
    least_chunks,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write ``local [N, H, segments, K, V]``: what each segment alone adds to the state."""
    VALUE_TILES: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    i_v = pid % VALUE_TILES
    i_g = pid // VALUE_TILES % segments
    i_h = pid // VALUE_TILES // segments % heads
    i_n = pid // VALUE_TILES // segments // heads
    i_b, start, length = locate(cu_seqlens, i_n, length)
    chunks = tl.cdiv(length, BLOCK_T)
    used = count_segments(chunks, segments, least_chunks)
    # nobody reads the segment that the scan meets last
    skipped = (i_g == 0) | (i_g >= used) if REVERSE else i_g >= used - 1
    if skipped:
        return
    first = chunks * i_g // used
    last = chunks * (i_g + 1) // used
    o_i = tl.arange(0, BLOCK_T)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    b_g = decay_rate(log_decay, i_h)
    b_full = power(b_g, BLOCK_T)
    i_b, start, i_h64 = (
        i_b + tl.zeros([], tl.int64),
        start + tl.zeros([], tl.int64),
        i_h.to(tl.int64),
    )
    p_k = k + i_b * stride_kb + start * stride_kt + i_h64 * stride_kh
    p_v = v + i_b * stride_vb + start * stride_vt + i_h64 * stride_vh
    b_s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for i in tl.range(first, last):
        i_c = first + last - 1 - i if REVERSE else i
        o_t = i_c * BLOCK_T + o_i
        rows = tl.minimum(length - i_c * BLOCK_T, BLOCK_T)
        b_k = load_rows(p_k, o_t, stride_kt, length, o_k, HEAD_DIM, BLOCK_K)
        b_v = load_rows(p_v, o_t, stride_vt, length, o_v, VALUE_DIM, BLOCK_V)
        b_whole = tl.where(rows == BLOCK_T, b_full, power(b_g, rows))
        b_weight = row_weights(b_g, o_i, rows, scale, REVERSE)
        b_s = advance(b_s, b_k, b_v, b_weight, b_whole, EXACT)
    p_s = local + ((i_n.to(tl.int64) * heads + i_h) * segments + i_g) * HEAD_DIM * VALUE_DIM
    p_s += o_k[:, None] * VALUE_DIM + o_v[None, :]
    tl.store(p_s, b_s, mask=(o_k < HEAD_DIM)[:, None] & (o_v < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["length", "segments", "least_chunks"])
def lightning_scan_kernel(
    q,
    k,
    v,
    log_decay,
    cu_seqlens,
    initial,
    local,
    out,
    final,
    scale,
    length,
    heads,
    segments,
    least_chunks,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_in,
    stride_ih,
    stride_ik,
    stride_iv,
    stride_ob,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Scan one segment of one head for ``BLOCK_V`` value channels.

    ``initial`` fp32 ``[N, H, K, V]`` (any strides, or None) is the state that the scan starts
    from, ``local`` (or None) what `lightning_state_kernel` wrote. ``out [B, T, H, V]`` is
    contiguous; ``final [N, H, K, V]`` (or None) gets the last state. ``scale`` multiplies the
    output; backwards in time it multiplies what a token adds, not ``initial``.
    """
    VALUE_TILES: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    # the value tiles of a segment read the same q and k: neighbours
    i_v = pid % VALUE_TILES
    i_g = pid // VALUE_TILES % segments
    i_h = pid // VALUE_TILES // segments % heads
    i_n = pid // VALUE_TILES // segments // heads
    i_b, start, length = locate(cu_seqlens, i_n, length)
    chunks = tl.cdiv(length, BLOCK_T)
    used = count_segments(chunks, segments, least_chunks)
    if i_g >= used:
        return
    first = chunks * i_g // used
    last = chunks * (i_g + 1) // used
    o_i = tl.arange(0, BLOCK_T)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_s = (o_k < HEAD_DIM)[:, None] & (o_v < VALUE_DIM)[None, :]
    i_n64, i_h64 = i_n.to(tl.int64), i_h.to(tl.int64)
    b_g = decay_rate(log_decay, i_h)

    # the state before the segment: the initial one and what the segments before it added
    b_s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial is not None:
        p_i = initial + i_n64 * stride_in + i_h64 * stride_ih
        p_i += o_k.to(tl.int64)[:, None] * stride_ik + o_v.to(tl.int64)[None, :] * stride_iv
        b_s = tl.load(p_i, mask=m_s, other=0.0)
    if local is not None:
        p_l = local + (i_n64 * heads + i_h) * segments * HEAD_DIM * VALUE_DIM
        p_l += o_k[:, None] * VALUE_DIM + o_v[None, :]
        before = used - 1 - i_g if REVERSE else i_g
        for j in tl.range(0, before, num_stages=1):
            i_j = used - 1 - j if REVERSE else j
            stop = tl.minimum(chunks * (i_j + 1) // used * BLOCK_T, length)
            steps = stop - chunks * i_j // used * BLOCK_T
            b_s = b_s * power(b_g, steps) + tl.load(
                p_l + i_j * HEAD_DIM * VALUE_DIM, mask=m_s, other=0.0
            )

    b_full = power(b_g, BLOCK_T)
    o_between = o_i[:, None] - o_i[None, :]
    if REVERSE:
        o_between = -o_between
    # clamped before the exponential: above the diagonal it would overflow
    b_pairs = tl.exp2(b_g * LOG2E * tl.maximum(o_between, 0)) * scale
    b_pairs = tl.where(o_between >= 0, b_pairs, 0.0)  # [BLOCK_T, BLOCK_T]
    i_b, start = i_b + tl.zeros([], tl.int64), start + tl.zeros([], tl.int64)
    p_q = q + i_b * stride_qb + start * stride_qt + i_h64 * stride_qh
    p_k = k + i_b * stride_kb + start * stride_kt + i_h64 * stride_kh
    p_v = v + i_b * stride_vb + start * stride_vt + i_h64 * stride_vh
    p_o = out + i_b * stride_ob + (start * heads + i_h) * VALUE_DIM + o_v[None, :]
    for i in tl.range(first, last):
        i_c = first + last - 1 - i if REVERSE else i
        o_t = i_c * BLOCK_T + o_i
        rows = tl.minimum(length - i_c * BLOCK_T, BLOCK_T)
        b_q = load_rows(p_q, o_t, stride_qt, length, o_k, HEAD_DIM, BLOCK_K)
        b_k = load_rows(p_k, o_t, stride_kt, length, o_k, HEAD_DIM, BLOCK_K)
        b_v = load_rows(p_v, o_t, stride_vt, length, o_v, VALUE_DIM, BLOCK_V)
        b_p = tl.dot(b_q, tl.trans(b_k)) * b_pairs  # [BLOCK_T, BLOCK_T]
        b_o = against_state(b_q, b_s)  # [BLOCK_T, BLOCK_V]
        b_whole = tl.where(rows == BLOCK_T, b_full, power(b_g, rows))
        b_weight = row_weights(b_g, o_i, rows, scale, REVERSE)
        if REVERSE:
            b_o = b_o * tl.exp2(b_g * LOG2E * tl.maximum(rows - 1 - o_i, 0))[:, None]
        else:
            b_o = b_o * (tl.exp2(b_g * LOG2E * (o_i + 1)) * scale)[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_o)
        m_o = (o_t < length)[:, None] & (o_v < VALUE_DIM)[None, :]
        p_rows = p_o + (o_t.to(tl.int64) * (heads * VALUE_DIM))[:, None]
        tl.store(p_rows, b_o.to(out.dtype.element_ty), mask=m_o)
        b_s = advance(b_s, b_k, b_v, b_weight, b_whole, EXACT)

    if final is not None:
        is_last = i_g == 0 if REVERSE else i_g == used - 1
        if is_last:
            p_f = final + (i_n64 * heads + i_h) * HEAD_DIM * VALUE_DIM
            p_f += o_k[:, None] * VALUE_DIM + o_v[None, :]
            tl.store(p_f, b_s, mask=m_s)
