"""From sums of atomics, fp32 and permuted, to rows of dq."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["flash_dq_sums_kernel"]


@triton.jit(do_not_specialize=["blocks", "q_heads", "q_len"])
def flash_dq_sums_kernel(
    dq_sums, dq, scale, blocks, q_heads, q_len,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write ``dq [B, Sq, Hq, D]`` from ``dq_sums [B, Hq, blocks, 64 * D]``. Grid: the blocks.

    A block lies as the threads of a warpgroup hold an accumulator: see
    `flash_backward_hopper_kernel`.
    """
    i_n = tl.program_id(0)
    i_bh = i_n // blocks
    i_b = (i_bh // q_heads).to(tl.int64)
    i_h = i_bh % q_heads
    p_sums = dq_sums + i_n.to(tl.int64) * (ROWS * HEAD_DIM)
    b_x = tl.load(p_sums + tl.arange(0, ROWS * HEAD_DIM)) * scale
    # column bits 3.., row bits 4 and 5, row bits 0 to 2, column bits 1 and 2, row bit 3, column
    # bit 0
    b_x = b_x.reshape([HEAD_DIM // 8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
    b_x = b_x.reshape([ROWS, HEAD_DIM])
    o_q = i_n % blocks * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, HEAD_DIM)
    p_dq = dq + ((i_b * q_len + o_q[:, None]) * q_heads + i_h) * HEAD_DIM + o_d[None, :]
    tl.store(p_dq, b_x.to(dq.dtype.element_ty), mask=(o_q < q_len)[:, None])
