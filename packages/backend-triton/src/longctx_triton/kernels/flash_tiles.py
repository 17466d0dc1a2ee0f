"""Device functions shared by the flash kernels: which tile a program owns and what it may see."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "cap_scores",
    "decode_e4m3",
    "key_ranges",
    "locate_sequence",
    "pick_tile",
    "row_ranges",
    "visible_pairs",
]


@triton.jit
def pick_tile(program, tiles, units, section, REVERSED: tl.constexpr):
    """Return ``(tile, unit)``: units (batch times heads) run in sections, tiles outermost inside.

    A section holds as many heads as the L2 cache has room for, so that programs running at the
    same time read the same keys; REVERSED starts with the last tile, the longest when causal.
    """
    first = program // (section * tiles) * section
    size = tl.minimum(section, units - first)
    inside = program - first * tiles
    tile = inside // size
    if REVERSED:
        tile = tiles - 1 - tile
    return tile, first + inside % size


@triton.jit
def locate_sequence(
    tile,
    ends,
    other_ends,
    sequences,
    length,
    other_length,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Return ``(start, length, first row, other start, other length)`` of a tile's sequence.

    Packed sequence ``n`` owns the tiles from ``ends[n] // BLOCK + n`` on: at least as many as it
    needs, so the grid follows from the total length alone. What is packed behind the last end
    counts as a sequence that sees nothing.
    """
    start = 0
    other_start = 0
    if VARLEN:
        low = 0
        high = sequences
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(ends + middle) // BLOCK + middle <= tile:
                low = middle
            else:
                high = middle - 1
        start = tl.load(ends + low)
        tile = tile - (start // BLOCK + low)
        if low < sequences:
            length = tl.load(ends + low + 1) - start
            other_start = tl.load(other_ends + low)
            other_length = tl.load(other_ends + low + 1) - other_start
        else:
            length = length - start
            other_length = 0
    return start, length, tile * BLOCK, other_start, other_length


@triton.jit
def key_ranges(
    first_row,
    q_len,
    k_len,
    left,
    right,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Return ``(begin, inner_begin, inner_end, end)`` of the keys that a tile of queries sees.

    Blocks in ``[inner_begin, inner_end)`` are seen whole by every row of the tile and need no
    mask; all but ``end`` are multiples of BLOCK_K.
    """
    top = first_row + k_len - q_len  # position of the first row
    bottom = tl.minimum(first_row + BLOCK_Q, q_len) - 1 + k_len - q_len
    begin = 0
    inner_begin = 0
    end = k_len
    inner_end = k_len
    if HAS_RIGHT:
        end = tl.minimum(tl.maximum(bottom + right + 1, 0), k_len)
        inner_end = tl.minimum(tl.maximum(top + right + 1, 0), k_len)
    if HAS_LEFT:
        begin = tl.maximum(top - left, 0) // BLOCK_K * BLOCK_K
        inner_begin = tl.cdiv(tl.maximum(bottom - left, 0), BLOCK_K) * BLOCK_K
        # a band narrower than a block has masked blocks alone, all of them in the first range
        inner_begin = tl.minimum(inner_begin, tl.cdiv(end, BLOCK_K) * BLOCK_K)
    inner_end = tl.maximum(inner_end // BLOCK_K * BLOCK_K, inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def row_ranges(
    first_key,
    q_len,
    k_len,
    left,
    right,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Return ``(begin, inner_begin, inner_end, end)`` of the queries that see a tile of keys.

    The counterpart of `key_ranges`; all but ``end`` are multiples of BLOCK_Q.
    """
    shift = k_len - q_len
    last_key = tl.minimum(first_key + BLOCK_K, k_len) - 1
    begin = 0
    inner_begin = 0
    end = q_len
    inner_end = q_len
    if HAS_LEFT:
        end = tl.minimum(tl.maximum(last_key + left - shift + 1, 0), q_len)
        inner_end = tl.minimum(tl.maximum(first_key + left - shift + 1, 0), q_len)
    if HAS_RIGHT:
        begin = tl.maximum(first_key - right - shift, 0) // BLOCK_Q * BLOCK_Q
        inner_begin = tl.cdiv(tl.maximum(last_key - right - shift, 0), BLOCK_Q) * BLOCK_Q
        inner_begin = tl.minimum(inner_begin, tl.cdiv(end, BLOCK_Q) * BLOCK_Q)
    inner_end = tl.maximum(inner_end // BLOCK_Q * BLOCK_Q, inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def visible_pairs(
    positions, keys, k_len, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Return the pairs that count, of broadcastable query positions and key indices."""
    keep = keys < k_len
    if HAS_RIGHT:
        keep = keep & (keys <= positions + right)
    if HAS_LEFT:
        keep = keep & (keys >= positions - left)
    return keep


@triton.jit
def cap_scores(scores, scale, softcap):
    """Return ``tanh(scores scale / softcap)`` from one exponential, without overflow."""
    turns = scores * (scale / softcap * 2.8853900817779268)  # 2 log2(e)
    # exp2 is inf or 0 at the far ends, which is what the limits 1 and -1 need
    return 1.0 - 2.0 / (1.0 + tl.exp2(turns))


@triton.jit
def decode_e4m3(raw):
    """Return fp16 values, exact, of e4m3 bytes: for tensor cores that know no fp8."""
    bits = raw.to(tl.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0  # exponent biases 15 and 7
