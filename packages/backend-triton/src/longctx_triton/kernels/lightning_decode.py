"""One token of linear attention: the state is read, updated and written once."""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.lightning_scan import decay_rate, power

__all__ = ["lightning_decode_kernel"]


@triton.jit
def lightning_decode_kernel(
    q,
    k,
    v,
    state,
    log_decay,
    out,
    scale,
    heads,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_sb,
    stride_sh,
    stride_sk,
    stride_sv,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Update ``BLOCK_V`` columns of one head's state ``[K, V]`` and write their output."""
    i_v = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k = o_k < HEAD_DIM
    m_v = o_v < VALUE_DIM
    m_s = m_k[:, None] & m_v[None, :]
    p_s = state + i_b * stride_sb + i_h * stride_sh
    p_s += o_k.to(tl.int64)[:, None] * stride_sk + o_v.to(tl.int64)[None, :] * stride_sv
    b_s = tl.load(p_s, mask=m_s, other=0.0)
    b_q = tl.load(q + i_b * stride_qb + i_h * stride_qh + o_k, mask=m_k, other=0.0)
    b_k = tl.load(k + i_b * stride_kb + i_h * stride_kh + o_k, mask=m_k, other=0.0)
    b_v = tl.load(v + i_b * stride_vb + i_h * stride_vh + o_v, mask=m_v, other=0.0)
    b_decay = power(decay_rate(log_decay, i_h), 1)
    b_s = b_s * b_decay + b_k.to(tl.float32)[:, None] * b_v.to(tl.float32)[None, :]
    tl.store(p_s, b_s, mask=m_s)
    b_o = tl.sum(b_s * b_q.to(tl.float32)[:, None], 0) * scale  # [BLOCK_V]
    p_o = out + (i_b * heads + i_h) * VALUE_DIM + o_v
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_v)
