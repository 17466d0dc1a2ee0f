"""The best entries of each row, however long and however many: a threshold, then their places.

The threshold is the k-th best score by bisection over the bits of the scores, a row a program; the
row is read again at each step, from the cache. What is chosen comes out in ascending order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_triton.kernels.topk_keys import NOTHING, chosen_places, middle, ordered_keys
from longctx_triton.launch.prepared import Prepared

__all__ = [
    "CHUNK",
    "choose_plans",
    "choose_rows",
    "found_size",
    "row_emit_kernel",
    "row_threshold_kernel",
]

CHUNK = 1024
"""Entries that a program of the elementwise kernels takes."""

ROW_BLOCK = 8192
"""Entries that a program which walks a whole row takes at a time; a multiple of CHUNK."""


@triton.jit
def _load_keys(p_row, o_n, length):
    return ordered_keys(tl.load(p_row + o_n, mask=o_n < length, other=float("-inf")))


@triton.jit(do_not_specialize=["s_b", "s_h", "length", "top_k", "chunks"])
def row_threshold_kernel(
    scores,  # fp32 [rows, L] by the strides below
    keep,  # int32 [B], read with KEEP in place of top_k
    found,  # int32 [rows, 3 + 2 chunks]: threshold, how many equal ones, how many chosen, before
    s_b,
    s_h,
    rows_a_batch,
    length,
    top_k,
    chunks,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(rows,)``; a chunk is what `row_emit_kernel` takes, and BLOCK is CHUNK times some."""
    i_row = tl.program_id(0)
    i_b = (i_row // rows_a_batch).to(tl.int64)
    p_row = scores + i_b * s_b + (i_row % rows_a_batch).to(tl.int64) * s_h
    if KEEP:
        top_k = tl.load(keep + i_b)
    o_b = tl.arange(0, BLOCK)
    b_least = tl.full([BLOCK], 2**31 - 1, tl.int32)
    b_most = tl.full([BLOCK], NOTHING, tl.int32)
    b_fit = tl.zeros([BLOCK], tl.int32)
    for n0 in range(0, length, BLOCK):
        b_keys = _load_keys(p_row, n0 + o_b, length)
        b_fit += (b_keys > NOTHING).to(tl.int32)
        b_least = tl.minimum(b_least, tl.where(b_keys > NOTHING, b_keys, 2**31 - 1))
        b_most = tl.maximum(b_most, b_keys)
    fit = tl.sum(b_fit, 0)
    top_k = tl.minimum(top_k, fit)
    # count(keys >= low) >= top_k > count(keys > high)
    low = tl.min(b_least, 0)
    high = tl.max(b_most, 0)
    count = fit
    while (low < high) & (count != top_k):
        mid = middle(low, high)
        b_count = tl.zeros([BLOCK], tl.int32)
        for n0 in range(0, length, BLOCK):
            b_count += (_load_keys(p_row, n0 + o_b, length) >= mid).to(tl.int32)
        n_mid = tl.sum(b_count, 0)
        if n_mid >= top_k:
            low = mid
            count = n_mid
        else:
            high = mid - 1
    if top_k == 0:
        low = tl.full([], 2**31 - 1, tl.int32)

    p_found = found + i_row.to(tl.int64) * (3 + 2 * chunks)
    above = 0
    equal = 0
    o_c = tl.arange(0, BLOCK // CHUNK)
    o_n = o_c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    for n0 in range(0, length, BLOCK):
        b_keys = _load_keys(p_row, n0 + o_n, length)  # [BLOCK / CHUNK, CHUNK]
        b_above = tl.sum((b_keys > low).to(tl.int32), 1)
        b_equal = tl.sum((b_keys == low).to(tl.int32), 1)
        i_c = n0 // CHUNK + o_c
        m_c = i_c < chunks
        tl.store(p_found + 3 + i_c, above + tl.cumsum(b_above, 0) - b_above, mask=m_c)
        tl.store(p_found + 3 + chunks + i_c, equal + tl.cumsum(b_equal, 0) - b_equal, mask=m_c)
        above += tl.sum(b_above, 0)
        equal += tl.sum(b_equal, 0)
    tl.store(p_found, low)
    tl.store(p_found + 1, top_k - above)
    tl.store(p_found + 2, top_k)


@triton.jit(do_not_specialize=["s_b", "s_h", "length", "chunks", "capacity", "recent"])
def row_emit_kernel(
    scores,
    found,
    indices,  # int32 [rows, capacity]
    counts,  # int32 [rows], written with COUNTS
    s_b,
    s_h,
    rows_a_batch,
    length,
    chunks,
    capacity,
    recent,  # entries behind the row that are chosen in any case
    CHUNK: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Grid ``(rows, chunks of entries or of places)``."""
    i_row = tl.program_id(0)
    i_b = (i_row // rows_a_batch).to(tl.int64)
    i_c = tl.program_id(1)
    p_row = scores + i_b * s_b + (i_row % rows_a_batch).to(tl.int64) * s_h
    p_found = found + i_row.to(tl.int64) * (3 + 2 * chunks)
    p_index = indices + i_row.to(tl.int64) * capacity
    low = tl.load(p_found)
    needed = tl.load(p_found + 1)
    chosen = tl.load(p_found + 2)
    o_n = i_c * CHUNK + tl.arange(0, CHUNK)
    if i_c < chunks:
        above = tl.load(p_found + 3 + i_c)
        equal = tl.load(p_found + 3 + chunks + i_c)
        b_keys = _load_keys(p_row, o_n, length)
        m_n, b_place = chosen_places(b_keys, low, above, equal, needed)
        tl.store(p_index + b_place, o_n, mask=m_n & (o_n < length) & (b_place < capacity))
    # the same program fills as many places behind the chosen ones, where its chunk lies there
    b_rest = tl.where(o_n - chosen < recent, length + o_n - chosen, -1)
    tl.store(p_index + o_n, b_rest, mask=(o_n >= chosen) & (o_n < capacity))
    if COUNTS:  # noqa: SIM102 (one is known to the compiler)
        if i_c == 0:
            tl.store(counts + i_row, chosen + recent)


def choose_rows(
    scores: Tensor,
    keep: Tensor | None,
    top_k: int,
    indices: Tensor,
    counts: Tensor | None,
    recent: int,
) -> None:
    """Write the positions of the ``keep[b]`` or ``top_k`` best of rows ``scores [B, H, L]``.

    ``indices [B, H, capacity]`` get them in ascending order, then the ``recent`` positions behind
    the row, then -1. Ties: lower position; scores of -inf and NaN are never chosen.
    """
    found = torch.empty(found_size(*scores.shape), dtype=torch.int32, device=scores.device)
    threshold, emit = choose_plans(
        scores.shape, scores.stride(), top_k, indices.shape[2], recent,
        keep is not None, counts is not None,
    )  # fmt: skip
    threshold(row_threshold_kernel, scores, found if keep is None else keep, found)
    emit(row_emit_kernel, scores, found, indices, found if counts is None else counts)


def found_size(batch: int, heads: int, length: int) -> int:
    """Return how many int32 `choose_rows` holds between its kernels."""
    return batch * heads * (3 + 2 * -(-length // CHUNK))


@lru_cache(maxsize=512)
def choose_plans(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    top_k: int,
    capacity: int,
    recent: int,
    keep: bool,
    counts: bool,
) -> tuple[Prepared, Prepared]:
    """Return the launches of both kernels for ``scores`` of a shape and strides."""
    batch, heads, length = shape
    rows, chunks = batch * heads, -(-length // CHUNK)
    threshold = Prepared(
        (rows,),
        (*strides[:2], heads, length, top_k, chunks),
        {"KEEP": keep, "CHUNK": CHUNK, "BLOCK": ROW_BLOCK, "num_warps": 16},
    )
    emit = Prepared(
        (rows, -(-max(length, capacity) // CHUNK)),
        (*strides[:2], heads, length, chunks, capacity, recent),
        {"CHUNK": CHUNK, "COUNTS": counts},
    )
    return threshold, emit
