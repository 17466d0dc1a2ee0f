"""The exact sum of partial attention results, by their log-sum-exp shifted by its maximum."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import padded

__all__ = ["merge_parts_kernel", "merge_plan"]

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["parts", "batch", "q_len"])
def merge_parts_kernel(
    parts_out,  # fp32 [parts, B, Sq, Hq, Dv]
    parts_lse,  # fp32 [parts, B, Hq, Sq]
    sinks,  # fp32 [Hq], read with SINKS: logits that enter the denominator alone
    out,  # [B, Sq, Hq, Dv]
    lse,  # [B, Hq, Sq]
    parts,
    batch,
    q_len,
    heads,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Grid ``(batch * Sq * Hq,)``; a part with lse -inf counts as nothing."""
    i_row = tl.program_id(0).to(tl.int64)
    i_h = i_row % heads
    i_i = i_row // heads % q_len
    i_b = i_row // heads // q_len
    o_lse = (i_b * heads + i_h) * q_len + i_i
    rows = batch.to(tl.int64) * q_len * heads
    o_v = tl.arange(0, BLOCK_DV)

    b_top = tl.full([], float("-inf"), tl.float32)
    if SINKS:
        b_top = tl.load(sinks + i_h).to(tl.float32) * LOG2_E
    b_sink = b_top
    for p0 in range(0, parts, BLOCK_P):
        o_p = (p0 + tl.arange(0, BLOCK_P)).to(tl.int64)
        b_part = tl.load(parts_lse + o_p * rows + o_lse, mask=o_p < parts, other=float("-inf"))
        b_top = tl.maximum(b_top, tl.max(b_part, 0) * LOG2_E)
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.exp2(b_sink - b_shift)
    b_acc = tl.zeros([BLOCK_DV], tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        o_p = (p0 + tl.arange(0, BLOCK_P)).to(tl.int64)
        b_part = tl.load(parts_lse + o_p * rows + o_lse, mask=o_p < parts, other=float("-inf"))
        b_w = tl.exp2(b_part * LOG2_E - b_shift)  # [BLOCK_P]
        m_p = (b_part > float("-inf"))[:, None] & (o_v < DV)[None, :]
        p_part = parts_out + (o_p * rows + i_row)[:, None] * DV + o_v[None, :]
        b_acc += tl.sum(b_w[:, None] * tl.load(p_part, mask=m_p, other=0.0), 0)
        b_sum += tl.sum(b_w, 0)
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(out + i_row * DV + o_v, b_out.to(out.dtype.element_ty), mask=o_v < DV)
    b_lse = (b_shift + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum))) * LN2
    tl.store(lse + o_lse, tl.where(b_sum == 0.0, float("-inf"), b_lse))


@lru_cache(maxsize=512)
def merge_plan(parts: int, out_shape: tuple[int, ...], sinks: bool) -> Prepared:
    """Return the launch; without sinks anything stands for them."""
    batch, q_len, heads, value_dim = out_shape
    return Prepared(
        (batch * q_len * heads,),
        (parts, batch, q_len, heads),
        {
            "DV": value_dim, "BLOCK_DV": padded(value_dim), "BLOCK_P": 16, "SINKS": sinks,
            "num_warps": 4,
        },
    )  # fmt: skip
