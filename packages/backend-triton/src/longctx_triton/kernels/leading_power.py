"""Bringing fp32 numbers into fp16's range without rounding them."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["leading_power"]


@triton.jit
def leading_power(b_x):
    """Return the largest power of two that is at most ``b_x >= 0`` (fp32); 1 for 0."""
    b_bits = b_x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(b_bits == 0, 1.0, b_bits.to(tl.float32, bitcast=True))
