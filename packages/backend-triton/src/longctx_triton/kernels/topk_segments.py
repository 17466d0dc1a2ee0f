"""Exact top-k of rows in segments that fit the registers: the best of each, then of those.

A member of a row's top-k is a member of its segment's. Every level keeps at least the k best of
each segment (SLOTS of them at most, which saves half of the search) in order of position, so that
ties still go to the lower one, until a single segment is left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.index_scores import row_bounds
from longctx_triton.kernels.topk_keys import NOTHING, chosen_places, middle, ordered_keys

__all__ = ["topk_segment_kernel"]


@triton.jit(
    do_not_specialize=[
        "b_first", "t_first", "rows_a_batch", "q_len", "shift", "k_len", "segments_in", "top_k",
        "s_xb", "s_yb",
    ]
)  # fmt: skip
def topk_segment_kernel(
    source,  # level 0: fp32 scores [rows, stride]; later: int32 keys [rows, segments_in, SLOTS]
    positions,  # int32 like the keys; not read at level 0
    counts,  # int32 [rows, segments_in]; likewise
    key_start,  # int32 [B, Sq], read with RANGE
    key_end,
    keys_out,  # int32 [rows, segments, SLOTS]; not written at the last level
    positions_out,  # likewise; at the last level the result [B, Sq, top_k]
    counts_out,  # int32 [rows, segments]; not written at the last level
    s_xb,
    s_yb,
    b_first,
    t_first,
    rows_a_batch,
    q_len,
    shift,
    k_len,
    stride,  # a multiple of 16
    segments_in,
    top_k,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    LEVEL0: tl.constexpr,
    LAST: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
):
    """Grid ``(rows, segments)``; row ``r`` is query ``t_first + r % rows_a_batch``."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b = b_first + i_row // rows_a_batch
    i_t = t_first + tl.program_id(0) % rows_a_batch
    i_s = tl.program_id(1)
    o_i = tl.arange(0, SEGMENT)
    o_n = i_s * SEGMENT + o_i
    if LEVEL0:
        low, high = row_bounds(
            i_t, i_t >= 0, key_start + i_b * s_xb, key_end + i_b * s_yb, shift, k_len, CAUSAL,
            RANGE,
        )  # fmt: skip
        # a mask in steps of 16 keeps the loads wide; what lies between was never written
        m_load = o_n < tl.cdiv(high, 16) * 16
        b_x = tl.load(source + i_row * stride + o_n, mask=m_load, other=float("-inf"))
        b_keys = tl.where((o_n >= low) & (o_n < high), ordered_keys(b_x), NOTHING)
        b_position = o_n
    else:
        o_in = o_n // SLOTS
        m_in = o_in < segments_in
        b_count = tl.load(counts + i_row * segments_in + o_in, mask=m_in, other=0)
        m_n = o_n % SLOTS < b_count
        p_in = i_row * segments_in * SLOTS + o_n
        m_load = o_n < segments_in * SLOTS
        b_keys = tl.where(m_n, tl.load(source + p_in, mask=m_load, other=0), NOTHING)
        b_position = tl.load(positions + p_in, mask=m_load, other=0)

    # the k-th best key, bit by bit: count(keys >= least) >= k > count(keys > most)
    fit = tl.sum((b_keys > NOTHING).to(tl.int32), 0)
    wanted = tl.minimum(fit, top_k)
    enough = wanted if LAST else tl.minimum(fit, SLOTS)
    least = tl.min(tl.where(b_keys > NOTHING, b_keys, 2**31 - 1), 0)
    most = tl.max(b_keys, 0)
    count = fit
    while (least < most) & (count > enough):
        mid = middle(least, most)
        n_mid = tl.sum((b_keys >= mid).to(tl.int32), 0)
        if n_mid >= wanted:
            least = mid
            count = n_mid
        else:
            most = mid - 1
    wanted = tl.maximum(wanted, tl.minimum(count, enough))
    needed = wanted - tl.sum((b_keys > least).to(tl.int32), 0)
    m_chosen, b_place = chosen_places(b_keys, least, 0, 0, needed)
    m_chosen = m_chosen & (b_keys > NOTHING)
    if LAST:
        p_out = positions_out + (i_b * q_len + i_t) * top_k
        tl.store(p_out + b_place, b_position, mask=m_chosen)
        for n0 in range(0, top_k, SEGMENT):
            m_rest = (n0 + o_i >= wanted) & (n0 + o_i < top_k)
            tl.store(p_out + n0 + o_i, tl.full([SEGMENT], -1, tl.int32), mask=m_rest)
    else:
        i_out = i_row * tl.num_programs(1) + i_s
        tl.store(keys_out + i_out * SLOTS + b_place, b_keys, mask=m_chosen)
        tl.store(positions_out + i_out * SLOTS + b_place, b_position, mask=m_chosen)
        tl.store(counts_out + i_out, wanted)
