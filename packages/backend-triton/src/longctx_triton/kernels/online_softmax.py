"""Device functions shared by the sparse attention kernels: tiles in, a running softmax, rows out.

Scores are kept in units of log2, so that ``exp2`` needs no further product: a kernel is given
``scale_log2 = |scale| log2(e)``, and multiplies the scores by the sign of the scale where it is
not positive. Queries are not touched: in registers they would keep products from overlapping.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_tile", "load_rows", "store_rows", "sum_as_log"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(p_x, o_n, stride, m_n, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Return rows ``o_n`` of ``p_x``, ``[N, BLOCK]``; 0 off ``m_n`` and beyond DIM channels."""
    o_d = tl.arange(0, BLOCK)
    m_rows = m_n[:, None]
    if DIM != BLOCK:
        m_rows = m_rows & (o_d[None, :] < DIM)
    p_rows = p_x + o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p_rows, mask=m_rows, other=0.0)


@triton.jit
def add_tile(b_s, b_v, b_m, b_l, b_acc, scale_log2):
    """Take one tile of scores ``b_s [M, N]`` (-inf where masked) and values ``b_v [N, DV]`` in."""
    b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
    # the maximum of a row that has seen nothing, -inf, must not be subtracted from itself
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
    b_fade = tl.exp2(b_m - b_shift)
    b_l = b_l * b_fade + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_fade[:, None])
    return b_top, b_l, b_acc


@triton.jit
def sum_as_log(b_m, b_l):
    """Return the natural log-sum-exp of rows with maximum ``b_m`` (log2) and sum ``b_l``."""
    b_log = (b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l))) * LN2
    return tl.where(b_l == 0.0, float("-inf"), b_log)


@triton.jit
def store_rows(
    b_acc,
    b_m,
    b_l,
    p_out,
    s_out,
    p_lse,
    o_m,
    m_m,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Write finished rows ``o_m`` of out (row stride ``s_out``) and lse; 0 and -inf if empty."""
    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    o_v = tl.arange(0, BLOCK_DV)
    m_out = m_m[:, None] & (o_v < DV)[None, :]
    p_rows = p_out + o_m.to(tl.int64)[:, None] * s_out + o_v[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_m, sum_as_log(b_m, b_l), mask=m_m)
