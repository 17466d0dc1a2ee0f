"""What becomes of the rows of a decode tile: stored, stored as a part, merged from parts."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LN2", "LOG2E", "merged", "store_part", "store_rows"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_part(p_part, b_o, b_max, b_sum, o_r, BLOCK_V: tl.constexpr, ROWS: tl.constexpr):
    """Store ``ROWS`` rows as a part, ``[ROWS, BLOCK_V]`` and base-2 log-sum-exps."""
    o_v = tl.arange(0, BLOCK_V)
    m_r = o_r < ROWS
    # a row that saw nothing is 0
    b_sum = tl.where(b_max == float("-inf"), 1.0, b_sum)
    p_o = p_part + o_r[:, None] * BLOCK_V + o_v[None, :]
    tl.store(p_o, b_o / b_sum[:, None], mask=m_r[:, None])
    tl.store(p_part + ROWS * BLOCK_V + o_r, b_max + tl.log2(b_sum), mask=m_r)


@triton.jit
def store_rows(
    out, lse, sinks, b_o, b_max, b_sum, o_token, o_head, i_b, q_len, heads,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store finished rows: ``b_o`` over the denominator, into which sinks enter."""
    o_v = tl.arange(0, BLOCK_V)
    m_m = o_token < q_len
    if sinks is not None:
        b_sink = tl.load(sinks + o_head, mask=m_m, other=0.0) * LOG2E
        b_new = tl.maximum(b_max, b_sink)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_alpha = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_alpha + tl.exp2(b_sink - b_shift)
        b_o = b_o * b_alpha[:, None]
        b_max = b_new
    b_sum = tl.where(b_max == float("-inf"), 1.0, b_sum)
    p_o = out + ((i_b.to(tl.int64) * q_len + o_token) * heads + o_head)[:, None] * VALUE_DIM
    m_o = m_m[:, None] & (o_v < VALUE_DIM)[None, :]
    tl.store(p_o + o_v[None, :], (b_o / b_sum[:, None]).to(out.dtype.element_ty), mask=m_o)
    p_lse = lse + (i_b.to(tl.int64) * heads + o_head) * q_len + o_token
    tl.store(p_lse, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)


@triton.jit
def merged(
    p_parts, used,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, RECORD: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge the first ``used`` parts, one every ``RECORD`` numbers, in their order.

    ``BLOCK_S`` at a time are read, also behind the last one: what is there is not used.

    Returns
    -------
    b_o : fp32 [ROWS, BLOCK_V]
    b_max, b_sum : fp32 [ROWS]
        As of rows that have met all keys.
    """
    o_v = tl.arange(0, BLOCK_V)
    o_r = tl.arange(0, ROWS)
    o_s = tl.arange(0, BLOCK_S)
    p_l = p_parts + ROWS * BLOCK_V + o_r[:, None] + o_s[None, :] * RECORD
    p_o = p_parts + o_r[:, None, None] * BLOCK_V + o_s[None, :, None] * RECORD
    p_o += o_v[None, None, :]
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_o = tl.zeros([ROWS, BLOCK_V], tl.float32)
    # two steps are read ahead: a step is little work behind a long way
    for i in tl.range(0, used, BLOCK_S, num_stages=3):
        # other programs wrote them: L1 is not asked
        b_part = tl.load(p_o, cache_modifier=".cg")  # [ROWS, BLOCK_S, BLOCK_V]
        b_l = tl.load(p_l, cache_modifier=".cg")  # [ROWS, BLOCK_S]
        m_s = i + o_s < used
        b_l = tl.where(m_s[None, :], b_l, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_l, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_alpha = tl.exp2(b_max - b_shift)
        b_w = tl.exp2(b_l - b_shift[:, None])
        b_sum = b_sum * b_alpha + tl.sum(b_w, 1)
        b_part = tl.where(m_s[None, :, None], b_w[:, :, None] * b_part, 0.0)
        b_o = b_o * b_alpha[:, None] + tl.sum(b_part, 1)
        b_max = b_new
        p_l += BLOCK_S * RECORD
        p_o += BLOCK_S * RECORD
    return b_o, b_max, b_sum
