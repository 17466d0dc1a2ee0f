"""Rows to fp8 e4m3 with one scale each, bit for bit as IEEE division and rounding give them."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["quantize_kernel"]


@triton.jit
def _e4m3_codes(b_y):
    """Return the e4m3 codes of fp32 values within +-448, ties to even; NaN stays NaN."""
    b_bits = b_y.to(tl.int32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    # keep 3 of 23 mantissa bits, rounded, and move the exponent's bias from 127 to 7
    b_normal = ((b_size + 0x7FFFF + ((b_size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2**-6 the codes count steps of 2**-9, which is what 2**14 resolves in fp32
    b_steps = (b_size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    b_small = b_steps - 0x46800000
    b_code = tl.where(b_size < 0x3C800000, b_small, b_normal)
    b_code = tl.where(b_size > 0x7F800000, 0x7F, b_code)
    return (b_code | ((b_bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["rows", "n_middle", "n_inner"])
def quantize_kernel(
    x,  # [outer, middle, inner, D]
    values,  # [rows, D]: e4m3 with HARDWARE, else its codes as uint8
    scales,  # fp32 [rows]
    s_outer,
    s_middle,
    s_inner,
    rows,
    n_middle,
    n_inner,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    POWER: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Grid ``(row tiles,)``."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    o_d = tl.arange(0, BLOCK_D)
    m_x = m_r[:, None] & (o_d < D)[None, :]
    o_inner = o_r % n_inner
    o_middle = o_r // n_inner % n_middle
    o_outer = o_r // n_inner // n_middle
    p_row = x + o_outer * s_outer + o_middle * s_middle + o_inner * s_inner
    b_x = tl.load(p_row[:, None] + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    # sizes as integers: their order is that of the floats, and NaN is above infinity
    b_size = b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_amax = tl.max(b_size, 1).to(tl.float32, bitcast=True)
    b_amax = tl.where(b_amax < 1e-4, 1e-4, b_amax)
    b_scale = tl.div_rn(b_amax, tl.full([BLOCK_R], 448.0, tl.float32))
    if POWER:
        # the exponent field of a positive float, one up unless the mantissa is already zero
        b_bits = b_scale.to(tl.int32, bitcast=True)
        b_power = (((b_bits + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
        b_scale = tl.where(b_bits < 0x7F800000, b_power, b_scale)
    b_y = tl.div_rn(b_x, tl.broadcast_to(b_scale[:, None], [BLOCK_R, BLOCK_D]))
    b_y = tl.where(b_y > 448.0, 448.0, tl.where(b_y < -448.0, -448.0, b_y))
    p_value = values + o_r[:, None] * D + o_d[None, :]
    if HARDWARE:
        tl.store(p_value, b_y.to(tl.float8e4nv), mask=m_x)
    else:
        tl.store(p_value, _e4m3_codes(b_y), mask=m_x)
    tl.store(scales + o_r, b_scale, mask=m_r)
