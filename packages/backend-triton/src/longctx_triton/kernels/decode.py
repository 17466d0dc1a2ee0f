"""Split-KV decode: one program attends one KV head's query rows to a share of the keys.

The query heads of a group and the new tokens are rows of one tile, so each key is read once. The
shares are computed on the device from the sequence's own length: a grid of fixed size serves any
lengths, and programs without a share leave at once. Where the partial results of a tile are few,
the program that is the last to write one merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longctx_triton.kernels.decode_rows import LOG2E, merged, store_part, store_rows
from longctx_triton.kernels.leading_power import leading_power

__all__ = ["decode_kernel", "first_block", "programs_used"]


@triton.jit
def first_block(length, q_len, window_left, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Return the first key block that any query sees."""
    first = tl.maximum(length - q_len - window_left, 0) // BLOCK_N if HAS_WINDOW else 0
    return first


@triton.jit
def programs_used(blocks, splits, least_blocks):
    """Return how many of the grid's splits get a share of a sequence of ``blocks`` key blocks.

    At least one, which writes the result of rows that have no keys.
    """
    return tl.maximum(tl.minimum(splits, tl.cdiv(blocks, least_blocks)), 1)


@triton.jit
def widen(b_x, FP8: tl.constexpr):
    """Convert a cache tile to what is multiplied: fp16 holds every e4m3 value."""
    if FP8 == "":
        b_w = b_x
    elif FP8 != "bits":
        b_w = b_x.to(tl.float16)
    else:
        # e4m3 bits shifted into place; the exponent's bias differs from fp16's by 8
        bits = b_x.to(tl.uint16)
        magnitude = bits & 0x7F
        b_w = (((bits & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True)
        b_w = tl.where(magnitude == 0x7F, float("nan"), b_w * 256.0).to(tl.float16)
    return b_w


@triton.jit
def softcapped(b_s, softcap):
    """Return ``softcap tanh(s / softcap)``; the exponential saturates the right way."""
    return softcap * (1.0 - 2.0 / (tl.exp2(b_s * (2.0 * LOG2E / softcap)) + 1.0))


@triton.jit(
    do_not_specialize=[
        "q_len", "splits", "least_blocks", "batch", "window_left", "stride_tb"
    ]
)  # fmt: skip
def decode_kernel(
    q,
    k_cache,
    v_cache,
    cache_seqlens,
    page_table,
    sinks,
    k_scale,
    v_scale,
    parts,
    counters,
    out,
    lse,
    scale,
    softcap,
    window_left,
    q_len,
    kv_heads,
    splits,
    least_blocks,
    batch,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_tb,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGED_PARTS: tl.constexpr,
):
    """Attend ``BLOCK_M`` rows of one KV head to one share of its keys.

    With ``SPLIT``, partial results in fp32 go to ``parts``. They are merged ``MERGED_PARTS`` at a
    time by the program that is the last of a tile to get there, which ``counters [B, Hkv, row
    blocks]``, all 0 before and after, tell. With 0 a kernel of its own merges them: ``parts`` is
    ``[splits, B, Sq, Hq, Dv]``, and behind it ``[splits, B, Hq, Sq]`` log-sum-exps, without sinks.
    ``ROWS`` is the least power of two that holds the rows of a tile.
    ``stride_kb`` and ``stride_vb`` step from page to page when ``PAGE_SIZE`` is not 0.
    """
    # neighbours read the same keys (row blocks), then the heads beside them in memory
    if ROWS < BLOCK_M:
        row_blocks = 1
        i_block = 0
        i_h = tl.program_id(0)
    else:
        row_blocks = tl.cdiv(q_len * GROUP, BLOCK_M)
        i_block = tl.program_id(0) % row_blocks
        i_h = tl.program_id(0) // row_blocks
    i_split = tl.program_id(1)
    i_b = tl.program_id(2)
    length = tl.load(cache_seqlens + i_b)
    # queries are on their way before the length is looked at
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)  # rows: query token major, head of the group
    o_d = tl.arange(0, BLOCK_D)
    o_token = o_m // GROUP
    o_head = i_h * GROUP + o_m % GROUP
    m_m = o_token < q_len
    m_d = o_d < HEAD_DIM
    p_q = q + i_b.to(tl.int64) * stride_qb
    p_q += o_token[:, None].to(tl.int64) * stride_qs + o_head[:, None].to(tl.int64) * stride_qh
    b_q = tl.load(p_q + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)

    start = first_block(length, q_len, window_left, BLOCK_N, HAS_WINDOW)
    blocks = tl.maximum(tl.cdiv(length, BLOCK_N) - start, 0)
    if SPLIT:
        used = programs_used(blocks, splits, least_blocks)
        if i_split >= used:
            return
        stop = start + blocks * (i_split + 1) // used
        start = start + blocks * i_split // used
    else:
        stop = start + blocks

    # the last key that each row sees
    o_last = length - q_len + o_token
    b_scale = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if FP8 != "":
        # fp16 holds every e4m3 key; a power of two brings each query row into its range exactly
        b_wide = b_q.to(tl.float32)
        b_unit = leading_power(tl.max(tl.abs(b_wide), 1))
        b_q = (b_wide / b_unit[:, None]).to(tl.float16)
        b_scale = b_scale * b_unit
    if k_scale is not None:
        b_scale = b_scale * tl.load(k_scale + i_b * kv_heads + i_h)
    if not HAS_SOFTCAP:
        b_scale = b_scale * LOG2E

    o_dv = tl.arange(0, BLOCK_V)
    p_k = k_cache + i_h.to(tl.int64) * stride_kh + o_d[None, :]
    p_v = v_cache + i_h.to(tl.int64) * stride_vh + o_dv[None, :]
    if PAGE_SIZE == 0:
        p_k += i_b.to(tl.int64) * stride_kb
        p_v += i_b.to(tl.int64) * stride_vb
    if PAGE_SIZE != 0:
        p_table = page_table + i_b.to(tl.int64) * stride_tb

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i_n in tl.range(start, stop):
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < length
        if PAGE_SIZE == 0:
            o_k = o_n.to(tl.int64) * stride_kn
            o_vn = o_n.to(tl.int64) * stride_vn
        elif PAGE_SIZE % BLOCK_N == 0:
            i_page = tl.load(p_table + i_n * BLOCK_N // PAGE_SIZE).to(tl.int64)
            o_slot = (o_n % PAGE_SIZE).to(tl.int64)
            o_k = i_page * stride_kb + o_slot * stride_kn
            o_vn = i_page * stride_vb + o_slot * stride_vn
        else:
            b_page = tl.load(p_table + o_n // PAGE_SIZE, mask=m_n, other=0).to(tl.int64)
            o_slot = (o_n % PAGE_SIZE).to(tl.int64)
            o_k = b_page * stride_kb + o_slot * stride_kn
            o_vn = b_page * stride_vb + o_slot * stride_vn
        # slots past the length may hold anything, NaN included: they are never read
        m_k = m_n[:, None]
        m_vn = m_n[:, None]
        if BLOCK_D != HEAD_DIM:
            m_k = m_k & m_d[None, :]
        if BLOCK_V != VALUE_DIM:
            m_vn = m_vn & (o_dv < VALUE_DIM)[None, :]
        b_k = tl.load(p_k + o_k[:, None], m_k, 0 if FP8 == "bits" else 0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(p_v + o_vn[:, None], m_vn, 0 if FP8 == "bits" else 0.0)  # [BLOCK_N, BLOCK_V]
        b_s = tl.dot(b_q, tl.trans(widen(b_k, FP8))) * b_scale[:, None]  # [BLOCK_M, BLOCK_N]
        if HAS_SOFTCAP:
            b_s = softcapped(b_s, softcap) * LOG2E
        m_s = o_n[None, :] <= o_last[:, None]
        if HAS_WINDOW:
            m_s = m_s & (o_n[None, :] >= o_last[:, None] - window_left)
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # a row that has seen nothing yet has no maximum to subtract
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_alpha = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_p = b_p.to(b_q.dtype)
        b_o = tl.dot(b_p, widen(b_v, FP8), acc=b_o * b_alpha[:, None])
        b_max = b_new
    if v_scale is not None:
        b_o = b_o * tl.load(v_scale + i_b * kv_heads + i_h)

    heads = kv_heads * GROUP
    if not SPLIT:
        store_rows(
            out, lse, sinks, b_o, b_max, b_sum, o_token, o_head, i_b, q_len, heads,
            VALUE_DIM, BLOCK_V,
        )  # fmt: skip
    elif MERGED_PARTS == 0:
        rows = batch.to(tl.int64) * q_len * heads
        p_out = parts + i_split * rows * VALUE_DIM
        p_lse = parts + (splits * VALUE_DIM + i_split) * rows
        store_rows(
            p_out, p_lse, None, b_o, b_max, b_sum, o_token, o_head, i_b, q_len, heads,
            VALUE_DIM, BLOCK_V,
        )  # fmt: skip
    elif used == 1:
        store_rows(
            out, lse, sinks, b_o, b_max, b_sum, o_token, o_head, i_b, q_len, heads,
            VALUE_DIM, BLOCK_V,
        )  # fmt: skip
    else:
        # multiples of 16 bytes
        RECORD: tl.constexpr = ROWS * BLOCK_V + (ROWS if ROWS > 4 else 4)
        i_tile = (i_b * kv_heads + i_h) * row_blocks + i_block
        p_parts = parts + i_tile.to(tl.int64) * splits * RECORD
        o_r = tl.arange(0, BLOCK_M)
        store_part(p_parts + i_split * RECORD, b_o, b_max, b_sum, o_r, BLOCK_V, ROWS)
        # one thread counts for all, once all have written
        tl.debug_barrier()
        before = tl.atomic_add(counters + i_tile, 1, sem="acq_rel", scope="gpu")
        if before == used - 1:
            tl.store(counters + i_tile, 0)
            b_all, b_top, b_total = merged(p_parts, used, BLOCK_V, ROWS, RECORD, MERGED_PARTS)
            o_row = i_block * BLOCK_M + tl.arange(0, ROWS)
            store_rows(
                out, lse, sinks, b_all, b_top, b_total, o_row // GROUP,
                i_h * GROUP + o_row % GROUP, i_b, q_len, heads, VALUE_DIM, BLOCK_V,
            )  # fmt: skip
