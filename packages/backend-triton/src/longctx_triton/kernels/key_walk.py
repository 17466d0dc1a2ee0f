"""Which key blocks a tile of queries walks on Hopper, counted alike by producer and consumers.

A walk is a number of steps of one key block each: first the ``masked`` ones, of which some row
sees a part only, then those that every row sees whole. It comes from two runs of keys (the first
keys, and the tile's own run) or from a list in memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["extent", "list_of", "locate", "positions_of", "run_start", "runs_of"]


@gluon.jit
def locate(turn, place, HEADS: gl.constexpr):
    """Return ``(batch entry, first head, tile)`` of this program's tile number ``turn``.

    The last tiles, which see the most, come first, section by section (heads that fit the L2
    cache together); every other round runs backwards over the programs. A unit is HEADS heads.
    """
    tiles, units, section, units_a_batch = place
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    slot = gl.where(turn % 2 == 0, program, programs - 1 - program)
    index = turn * programs + slot
    first = index // (section * tiles) * section
    size = gl.minimum(section, units - first)
    inside = index - first * tiles
    unit = first + inside % size
    return unit // units_a_batch, unit % units_a_batch * HEADS, tiles - 1 - inside // size


@gluon.jit
def positions_of(i_t, ranges, ROWS: gl.constexpr):
    """Return a tile's first position, and where its block of positions starts."""
    _, origin, first_tile, block, tiles_a_block, _, _, _, _ = ranges
    i_t = i_t + first_tile
    low0 = origin + i_t // tiles_a_block * block
    return low0 + i_t % tiles_a_block * ROWS, low0


@gluon.jit
def runs_of(
    i_h, p0, low0, ranges,
    ROWS: gl.constexpr, BLOCK_K: gl.constexpr, BY_BLOCK: gl.constexpr,
    HEAD_WINDOWS: gl.constexpr,
):  # fmt: skip
    """Return what bounds the keys of a tile's rows, and its two runs of blocks.

    Position ``p`` sees key ``n`` when ``n <= p`` and (``n < anchor`` or ``n >= low(p)``), where
    ``low(p)`` is ``p - window`` or the start of the block of positions. The own run ends with the
    tile's last position and is counted downwards, so that the diagonal lies in the first steps and
    the window's lower edge in the last ones.
    """
    k_len, _, _, block, _, anchor, window, last_queries, head_windows = ranges
    top = p0 + ROWS
    p_last = gl.minimum(gl.minimum(top, low0 + block), k_len) - 1
    p_all = k_len - last_queries  # rows from here on see everything
    if BY_BLOCK:
        low_min = low0
        low_max = low0
    else:
        if HEAD_WINDOWS:
            window = gl.minimum(gl.load(head_windows + i_h), k_len)
        low_min = gl.where(p_last >= p_all, 0, gl.maximum(p0 - window, 0))
        low_max = gl.where(p0 >= p_all, 0, gl.maximum(p_last - window, 0))
    # the two runs are kept apart, so that no pair counts twice, or become one
    joined = anchor >= low_max
    low_min = gl.where(joined, 0, gl.maximum(low_min, anchor))
    low_max = gl.where(joined, 0, low_max)
    a_end = gl.where(joined, 0, anchor)

    own = gl.maximum((top - low_min + BLOCK_K - 1) // BLOCK_K, 1)
    diagonal = gl.minimum((ROWS - 2 + BLOCK_K) // BLOCK_K, own)
    edge = gl.maximum(diagonal, (top - low_max) // BLOCK_K)  # the own run's first block cut below
    far = gl.maximum(gl.minimum(a_end, p0 + 1), 0) // BLOCK_K  # first keys' whole blocks
    own_masked = diagonal + own - edge
    masked = own_masked + (a_end + BLOCK_K - 1) // BLOCK_K - far
    steps = masked + edge - diagonal + far
    bounds = (p0, low0, window, p_all, joined, anchor, a_end, own_masked)
    return bounds, (top, diagonal, edge, far, own_masked, masked, steps)


@gluon.jit
def run_start(i, runs, BLOCK_K: gl.constexpr):
    """Return the first key of step ``i``; it may lie before key 0."""
    top, diagonal, edge, far, own_masked, masked, _ = runs
    cut = i < masked
    rest = i - masked
    between = edge - diagonal
    from_top = gl.where(cut, gl.where(i < diagonal, i, edge + i - diagonal), diagonal + rest)
    from_zero = gl.where(cut, far + i - own_masked, rest - between)
    is_own = gl.where(cut, i < own_masked, rest < between)
    return gl.where(is_own, top - (from_top + 1) * BLOCK_K, from_zero * BLOCK_K)


@gluon.jit
def list_of(i_b, i_h, i_t, lists):
    """Return the number of a tile's list."""
    _, _, heads_a_set, sets, tiles, _ = lists
    return ((i_b * sets + i_h // heads_a_set) * tiles + i_t).to(gl.int64)


@gluon.jit
def extent(
    i_b, i_h, at, low0, plan,
    ROWS: gl.constexpr, BLOCK_K: gl.constexpr, LIST: gl.constexpr,
    BY_BLOCK: gl.constexpr, HEAD_WINDOWS: gl.constexpr,
):  # fmt: skip
    """Return ``(masked steps, steps, first key)`` of a tile's walk.

    ``at`` is the tile's number where walks are lists, else its first position; ``low0`` is that of
    its block.
    """
    if LIST:
        starts, counts, _, _, _, capacity = plan
        number = list_of(i_b, i_h, at, plan)
        masked = gl.load(counts + 2 * number)
        steps = gl.load(counts + 2 * number + 1)
        first = gl.load(starts + number * capacity)
    else:
        _, runs = runs_of(i_h, at, low0, plan, ROWS, BLOCK_K, BY_BLOCK, HEAD_WINDOWS)
        masked = runs[5]
        steps = runs[6]
        first = run_start(0, runs, BLOCK_K)
    return masked, steps, first
