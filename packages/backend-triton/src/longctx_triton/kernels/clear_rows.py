"""Attention results of rows that attend nothing."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["clear_rows_kernel"]


@triton.jit(do_not_specialize=["rows"])
def clear_rows_kernel(
    out,
    lse,  # fp32 [rows]
    counter,  # int32 [1]
    numbers,  # of out
    rows,
    BLOCK: tl.constexpr,
):
    """Grid ``(cdiv(numbers, BLOCK),)``: 0 and -inf; there are at least as many numbers as rows.

    The counter of the kernel that comes next is set to 0 as well.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o_n = first + tl.arange(0, BLOCK)
    tl.store(out + o_n, tl.zeros([BLOCK], out.dtype.element_ty), mask=o_n < numbers)
    if first == 0:
        tl.store(counter, 0)
    if first < rows:
        tl.store(lse + o_n, tl.full([BLOCK], float("-inf"), tl.float32), mask=o_n < rows)
