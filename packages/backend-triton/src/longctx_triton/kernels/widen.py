"""fp8 to fp16, which holds every e4m3 value."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["widen_kernel"]


@triton.jit(do_not_specialize=["rows", "seq"])
def widen_kernel(
    x, out, rows, seq, heads, stride_b, stride_s, stride_h,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copy ``x [B, S, H, D]`` to ``out``, contiguous; ``rows`` of them, ROWS a program."""
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, HEAD_DIM)
    m_r = (o_r < rows)[:, None]
    i_h = o_r % heads
    i_t = o_r // heads
    p_x = (i_t // seq).to(tl.int64) * stride_b + (i_t % seq).to(tl.int64) * stride_s
    p_x = x + (p_x + i_h.to(tl.int64) * stride_h)[:, None] + o_d[None, :]
    p_out = out + o_r.to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_out, tl.load(p_x, mask=m_r).to(out.dtype.element_ty), mask=m_r)
