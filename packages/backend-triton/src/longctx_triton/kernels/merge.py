"""Merging partial attention results by their log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.decode import first_block, programs_used
from longctx_triton.kernels.decode_rows import LN2, LOG2E

__all__ = ["merge_kernel", "merge_splits_kernel"]


@triton.jit(
    do_not_specialize=[
        "parts", "rows", "q_len", "heads", "stride_lp", "stride_lb", "stride_lh"
    ]
)  # fmt: skip
def merge_kernel(
    outs,
    lses,
    out,
    lse,
    parts,
    rows,
    q_len,
    heads,
    stride_op,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lp,
    stride_lb,
    stride_lh,
    stride_ls,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Merge ``outs [S, B, Sq, Hq, D]`` and ``lses [S, B, Hq, Sq]`` for ``BLOCK_R`` rows."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (b, token, head)
    o_v = tl.arange(0, BLOCK_V)
    m_r = o_r < rows
    o_head = o_r % heads
    o_token = (o_r // heads) % q_len
    o_b = o_r // heads // q_len
    p_l = lses + o_b * stride_lb + o_head * stride_lh + o_token * stride_ls
    p_o = outs + (o_b * stride_ob + o_token * stride_os + o_head * stride_oh)[:, None]
    p_o += o_v[None, :]
    m_v = (o_v < VALUE_DIM)[None, :]

    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    p_part = p_l
    for _ in tl.range(0, parts):
        b_max = tl.maximum(b_max, tl.load(p_part, mask=m_r, other=float("-inf")))
        p_part += stride_lp
    m_some = b_max > float("-inf")
    b_shift = tl.where(m_some, b_max, 0.0)

    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_o = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    p_part = p_l
    for _ in tl.range(0, parts):
        b_l = tl.load(p_part, mask=m_r, other=float("-inf"))
        b_w = tl.exp2((b_l - b_shift) * LOG2E)
        # what an empty part holds is never read
        m_o = (m_r & (b_l > float("-inf")))[:, None] & m_v
        b_part = tl.load(p_o, mask=m_o, other=0.0)
        b_o += b_w[:, None] * b_part.to(tl.float32)
        b_sum += b_w
        p_part += stride_lp
        p_o += stride_op
    b_sum = tl.where(m_some, b_sum, 1.0)
    b_o = b_o / b_sum[:, None]
    b_lse = tl.where(m_some, b_shift + tl.log2(b_sum) * LN2, float("-inf"))
    p_out = out + o_r[:, None] * VALUE_DIM + o_v[None, :]
    tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_r[:, None] & m_v)
    tl.store(lse + (o_b * heads + o_head) * q_len + o_token, b_lse, mask=m_r)


@triton.jit(do_not_specialize=["q_len", "heads", "splits", "least_blocks", "window_left", "batch"])
def merge_splits_kernel(
    outs,
    cache_seqlens,
    sinks,
    out,
    lse,
    window_left,
    q_len,
    heads,
    splits,
    least_blocks,
    batch,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Merge one row's partial results: those of the splits that its length gave a share.

    ``outs`` holds ``[splits, B, Sq, Hq, Dv]`` and, behind them, log-sum-exps ``[splits, B, Hq,
    Sq]``, all fp32; the other splits' slots were never written.
    """
    i_head = tl.program_id(0) % heads
    i_token = tl.program_id(0) // heads
    i_b = tl.program_id(1)
    length = tl.load(cache_seqlens + i_b)
    start = first_block(length, q_len, window_left, BLOCK_N, HAS_WINDOW)
    blocks = tl.maximum(tl.cdiv(length, BLOCK_N) - start, 0)
    used = programs_used(blocks, splits, least_blocks)
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < VALUE_DIM
    i_row = (i_b.to(tl.int64) * q_len + i_token) * heads + i_head
    i_lse = (i_b.to(tl.int64) * heads + i_head) * q_len + i_token
    rows = batch.to(tl.int64) * q_len * heads
    lses = outs + splits * rows * VALUE_DIM

    b_max = tl.full([], float("-inf"), tl.float32)
    if sinks is not None:
        b_max = tl.load(sinks + i_head) * LOG2E
    b_sink = b_max
    for i in tl.range(0, used, BLOCK_S):
        o_s = i + tl.arange(0, BLOCK_S)
        b_l = tl.load(lses + o_s.to(tl.int64) * rows + i_lse, mask=o_s < used, other=float("-inf"))
        b_max = tl.maximum(b_max, tl.max(b_l, 0) * LOG2E)
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)

    b_sum = tl.exp2(b_sink - b_shift)
    b_o = tl.zeros([BLOCK_V], tl.float32)
    for i in tl.range(0, used, BLOCK_S):
        o_s = i + tl.arange(0, BLOCK_S)
        b_l = tl.load(lses + o_s.to(tl.int64) * rows + i_lse, mask=o_s < used, other=float("-inf"))
        b_w = tl.exp2(b_l * LOG2E - b_shift)  # [BLOCK_S]
        p_o = outs + (o_s.to(tl.int64) * rows + i_row)[:, None] * VALUE_DIM + o_v[None, :]
        b_part = tl.load(p_o, mask=(o_s < used)[:, None] & m_v[None, :], other=0.0)
        b_o += tl.sum(b_w[:, None] * b_part, 0)
        b_sum += tl.sum(b_w, 0)
    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_lse = tl.where(m_empty, float("-inf"), (b_shift + tl.log2(b_sum)) * LN2)
    p_out = out + i_row * VALUE_DIM + o_v
    tl.store(p_out, (b_o / b_sum).to(out.dtype.element_ty), mask=m_v)
    tl.store(lse + i_lse, b_lse)
