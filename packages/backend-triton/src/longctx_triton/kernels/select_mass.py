"""How many tokens to keep so that the dropped tail holds a given share of the mass, on the device.

The mass of a token is the fp64 mean of its scores over heads, as a whole number of 2**-52 parts of
the sum: whole numbers add up to the same in any order. The crossing is found by bisection over the
bits of these numbers, four ways at a time, without a sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["head_mean_kernel", "keep_count_kernel"]

PARTS = tl.constexpr(2.0**52)


@triton.jit(do_not_specialize=["s_b", "s_h", "length", "heads"])
def head_mean_kernel(
    scores,  # fp32 [B, H, L]
    means,  # fp64 [B, L]
    partial_sums,  # fp64 [B, chunks]
    s_b,
    s_h,
    length,
    heads,
    BLOCK: tl.constexpr,
):
    """Grid ``(chunks, batch)``."""
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < length
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i in range(0, heads):
        p_row = scores + i_b * s_b + tl.cast(i, tl.int64) * s_h
        b_sum += tl.load(p_row + o_n, mask=m_n, other=0.0).to(tl.float64)
    b_mean = b_sum / heads.to(tl.float64)
    tl.store(means + i_b * length + o_n, b_mean, mask=m_n)
    tl.store(partial_sums + i_b * tl.num_programs(0) + tl.program_id(0), tl.sum(b_mean, 0))


@triton.jit
def _whole_parts(p_mean, o_n, length, unit):
    """Return the masses as int64, and the bits of the same numbers in fp64, which sort alike."""
    b_mean = tl.load(p_mean + o_n, mask=o_n < length, other=0.0)
    b_mass = (b_mean * unit + 0.5).to(tl.int64)
    return b_mass, b_mass.to(tl.float64).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=["length", "chunks", "drop_parts", "min_tokens"])
def keep_count_kernel(
    means,  # fp64 [B, L]
    partial_sums,  # fp64 [B, chunks]
    keep,  # int32 [B]
    length,
    chunks,
    drop_parts,  # ceil(drop_mass 2**52)
    min_tokens,
    BLOCK: tl.constexpr,
):
    """Grid ``(batch,)``: ``keep = max(min_tokens, L - (count(cumsum(ascending) < drop) + 1))``."""
    i_b = tl.program_id(0).to(tl.int64)
    p_mean = means + i_b * length
    o_b = tl.arange(0, BLOCK)
    b_total = tl.zeros([BLOCK], tl.float64)
    for c0 in range(0, chunks, BLOCK):
        p_sum = partial_sums + i_b * chunks + c0 + o_b
        b_total += tl.load(p_sum, mask=c0 + o_b < chunks, other=0.0)
    total = tl.sum(b_total, 0)
    unit = tl.where(total > 0.0, PARTS / tl.where(total > 0.0, total, 1.0), 0.0)
    drop = tl.cast(drop_parts, tl.int64)

    # sums up to `low` stay below the drop mass, sums up to `high` reach it (or hold everything)
    b_most = tl.zeros([BLOCK], tl.int64)
    for n0 in range(0, length, BLOCK):
        b_mass, b_bits = _whole_parts(p_mean, n0 + o_b, length, unit)
        b_most = tl.maximum(b_most, b_bits)
    high = tl.max(b_most, 0)
    low = high * 0 - 1
    count_low = low + 1
    mass_low = low + 1
    count_high = count_low + length
    while (high - low > 1) & (count_high - count_low > 1):
        step = (high - low) // 4
        mid1 = low + tl.maximum(step, 1)
        mid2 = low + (high - low) // 2
        mid3 = high - step
        b_mass1 = tl.zeros([BLOCK], tl.int64)
        b_mass2 = tl.zeros([BLOCK], tl.int64)
        b_mass3 = tl.zeros([BLOCK], tl.int64)
        b_count1 = tl.zeros([BLOCK], tl.int32)
        b_count2 = tl.zeros([BLOCK], tl.int32)
        b_count3 = tl.zeros([BLOCK], tl.int32)
        for n0 in range(0, length, BLOCK):
            b_mass, b_bits = _whole_parts(p_mean, n0 + o_b, length, unit)
            m_n = n0 + o_b < length
            b_mass1 += tl.where(b_bits <= mid1, b_mass, 0)
            b_mass2 += tl.where(b_bits <= mid2, b_mass, 0)
            b_mass3 += tl.where(b_bits <= mid3, b_mass, 0)
            b_count1 += (m_n & (b_bits <= mid1)).to(tl.int32)
            b_count2 += (m_n & (b_bits <= mid2)).to(tl.int32)
            b_count3 += (m_n & (b_bits <= mid3)).to(tl.int32)
        mass1 = tl.sum(b_mass1, 0)
        mass2 = tl.sum(b_mass2, 0)
        mass3 = tl.sum(b_mass3, 0)
        count1 = tl.sum(b_count1, 0).to(tl.int64)
        count2 = tl.sum(b_count2, 0).to(tl.int64)
        count3 = tl.sum(b_count3, 0).to(tl.int64)
        # from the top down: a middle that reaches the drop mass bounds from above, the others
        # raise the lower bound
        if mass3 >= drop:
            high = mid3
            count_high = count3
        else:
            low = mid3
            mass_low = mass3
            count_low = count3
        if (mass2 >= drop) & (mid2 < high):
            high = mid2
            count_high = count2
        elif (mass2 < drop) & (mid2 > low):
            low = mid2
            mass_low = mass2
            count_low = count2
        if (mass1 >= drop) & (mid1 < high):
            high = mid1
            count_high = count1
        elif (mass1 < drop) & (mid1 > low):
            low = mid1
            mass_low = mass1
            count_low = count1

    # what lies between the bounds is one token, or tokens of one mass: how many stay below? (The
    # mass of a single token may be less than `value`, but then it crosses all the same.)
    value = high.to(tl.float64, bitcast=True).to(tl.int64)
    equal = count_high - count_low
    below = tl.minimum(equal, (drop - mass_low - 1) // tl.maximum(value, 1))
    if mass_low + equal * value < drop:
        below = equal  # rounding, or a drop mass of 1: the whole falls short of it
    keep_n = tl.maximum(length - (count_low + below + 1), tl.minimum(min_tokens, length))
    tl.store(keep + i_b, keep_n.to(tl.int32))
