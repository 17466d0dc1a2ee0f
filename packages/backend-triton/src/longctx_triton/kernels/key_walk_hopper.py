"""Attention along a walk of key blocks on Hopper: warp-specialised, persistent, in Gluon.

The design and the inner step are those of `flash_hopper`: one warp copies, two warpgroups of 64
query rows multiply. Which key blocks a tile of queries meets, and which of them need a mask, comes
from `key_walk`. Tiles of a window are short, so what happens once a tile counts: the copying warp
finds out where the next tile lies and tells the others, its queries are copied as soon as the last
scores are through, and steps that are cut on one side are masked on that side only.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longctx_triton.compat import async_load, async_store, barrier
from longctx_triton.kernels.flash_hopper import copy_block, multiplied, multiply, share
from longctx_triton.kernels.flash_hopper_softmax import (
    NOTHING_SEEN,
    ROW_THREADS,
    ROWS,
    block_softmax,
    denominator,
    faded,
    hide,
)
from longctx_triton.kernels.key_walk import (
    extent,
    list_of,
    locate,
    positions_of,
    run_start,
    runs_of,
)
from longctx_triton.kernels.mailbox import read_place

__all__ = ["key_walk_hopper_kernel"]

_ROWS = gl.constexpr(ROWS)
_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)
_PLACES = gl.constexpr(32)  # threads of the copying warp


@gluon.jit
def _tell(letter, i_b, i_h, at, low0):
    """Tell the consumers where the tile lies whose queries come next.

    Left to themselves they would divide three times before their first mask. Each thread writes a
    place of its own, as in `mailbox`; the bar of the queries says that it is written.
    """
    o = gl.arange(0, _PLACES, gl.BlockedLayout([1], [32], [1], [0]))
    pair = gl.where(o == 0, i_b, i_h)
    letter.store(gl.where(o < 2, pair, gl.where(o == 2, at, low0)))
    barrier()


@gluon.jit
def _feed(
    p_q, p_k, p_v, bars, sizes, place, plan,
    HEADS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    LIST: gl.constexpr, BY_BLOCK: gl.constexpr, HEAD_WINDOWS: gl.constexpr,
):  # fmt: skip
    """Copy queries, then the keys and values of each step, tile after tile."""
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, letter = bars
    lag, group = sizes
    step = 0
    for turn in range(share(place[0] * place[1])):
        i_b, i_h, i_t = locate(turn, place, HEADS)
        i_g = i_h // group
        at = i_t
        low0 = 0
        row = i_t * (2 * _ROWS // HEADS)
        if not LIST:
            at, low0 = positions_of(i_t, plan, 2 * _ROWS // HEADS)
            row = at - lag
        _, steps, first = extent(
            i_b, i_h, at, low0, plan, 2 * _ROWS // HEADS, BLOCK_K, LIST, BY_BLOCK, HEAD_WINDOWS
        )
        if LIST:
            starts = plan[0] + list_of(i_b, i_h, i_t, plan) * plan[5]
            coming = gl.load(starts + gl.minimum(1, steps - 1))
        else:
            _, runs = runs_of(
                i_h, at, low0, plan, 2 * _ROWS // HEADS, BLOCK_K, BY_BLOCK, HEAD_WINDOWS
            )
        # the first keys need not wait until the last tile's queries are done with
        copy_block(p_k, i_b, first, i_g, k_s, k_full, k_empty, step, STAGES)
        for g in gl.static_range(2):
            mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
            if g == 0:
                _tell(letter.index(turn & 1), i_b, i_h, at, low0)
            mbarrier.expect(q_full.index(g), p_q.block_type.nbytes)
            if HEADS == 2:
                async_load(p_q, [i_b, row, i_h + g, 0], q_full.index(g), q_s.index(g))
            else:
                async_load(p_q, [i_b, row + g * _ROWS, i_h, 0], q_full.index(g), q_s.index(g))
        # a step's values are needed one step after its keys
        for i in range(1, steps):
            if LIST:
                here = coming
                # a step ahead: the address is needed long after the stage is free
                coming = gl.load(starts + gl.minimum(i + 1, steps - 1))
            else:
                here = run_start(i, runs, BLOCK_K)
            copy_block(p_k, i_b, here, i_g, k_s, k_full, k_empty, step + i, STAGES)
            copy_block(p_v, i_b, first, i_g, v_s, v_full, v_empty, step + i - 1, STAGES + 1)
            first = here
        step += steps
        copy_block(p_v, i_b, first, i_g, v_s, v_full, v_empty, step - 1, STAGES + 1)


@gluon.jit
def _hide(
    b_s, bounds, i, first, o_q, highest,
    LIST: gl.constexpr, BY_BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Hide those scores of a masked step ``i`` that rows ``o_q`` do not see."""
    if LIST:
        # a limit of all rows, in a form that keeps the column numbers out of registers
        b_high = gl.minimum(o_q + highest, highest)
        if CAUSAL:
            b_high = bounds[0] + o_q
        b_s = hide(b_s, b_high - first, True)
    else:
        # most masked steps are cut on one side only: the other side's comparisons are skipped
        p0, low0, window, p_all, joined, anchor, a_end, own_masked = bounds
        o_p = p0 + o_q
        own = i < own_masked
        columns: gl.constexpr = b_s.shape[1]
        lowest = low0 if BY_BLOCK else p0 + 2 * _ROWS - window
        if own & (first < gl.maximum(lowest, anchor)):
            if BY_BLOCK:
                b_low = gl.minimum(o_p, low0)
            else:
                b_low = gl.where(o_p >= p_all, 0, gl.maximum(o_p - window, 0))
            b_low = gl.where(joined, 0, gl.maximum(b_low, anchor))
            b_s = hide(b_s, b_low - first, False)
        last = gl.where(own, highest, a_end - 1)
        if first + columns > gl.minimum(p0, last):
            b_s = hide(b_s, gl.minimum(o_p, last) - first, True)
    return b_s


@gluon.jit
def _consume(
    ours, bars, sizes, place, plan,
    G: gl.constexpr, HEADS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, LIST: gl.constexpr, CAUSAL: gl.constexpr, BY_BLOCK: gl.constexpr,
    HEAD_WINDOWS: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """Attend for 64 rows of each of the program's tiles: its half, or its second head."""
    p_o, lse, sinks, o_s, scale, q_len, highest = ours
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, letter = bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    V_STAGES: gl.constexpr = STAGES + 1
    scale2 = scale * _LOG2E
    # the tile's rows are 128 of one head or 64 of two; the second consumer takes the latter half
    half: gl.constexpr = 0 if HEADS == 2 else G * _ROWS
    o_q = gl.arange(0, _ROWS, rows) + half
    q = q_s.index(G).reshape([_ROWS, HEAD_DIM])
    o_stage = o_s.index(G)
    step = 0  # steps so far, over all tiles: it numbers the stages
    for turn in range(share(place[0] * place[1])):
        mbarrier.wait(q_full.index(G), turn & 1)
        b_m = gl.full([_ROWS], NOTHING_SEEN, gl.float32, rows)
        b_l = gl.zeros([_ROWS, 4], gl.float32, ROW_THREADS)
        b_o = gl.zeros([_ROWS, HEAD_DIM], gl.float32, o_layout)
        b_zero = gl.zeros([_ROWS, BLOCK_K], gl.float32, s_layout)

        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        k = k_s.index(slot).reshape([BLOCK_K, HEAD_DIM])
        b_s = warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        # where the tile lies, while its first scores are computed
        i_b = read_place(letter.index(turn & 1), 0)
        i_h = read_place(letter.index(turn & 1), 1)
        at = read_place(letter.index(turn & 1), 2)
        low0 = read_place(letter.index(turn & 1), 3)
        masked, steps, first = extent(
            i_b, i_h, at, low0, plan, 2 * _ROWS // HEADS, BLOCK_K, LIST, BY_BLOCK, HEAD_WINDOWS
        )
        if LIST:
            row = at * (2 * _ROWS // HEADS)
            bounds = (row + sizes[0],)
            starts = plan[0] + list_of(i_b, i_h, at, plan) * plan[5]
        else:
            bounds, runs = runs_of(
                i_h, at, low0, plan, 2 * _ROWS // HEADS, BLOCK_K, BY_BLOCK, HEAD_WINDOWS
            )
            row = at - sizes[0]
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        if steps == 1:
            mbarrier.arrive(q_empty.index(G), count=1)
        b_s = _hide(b_s, bounds, 0, first, o_q, highest, LIST, BY_BLOCK, CAUSAL)
        b_p, b_m, b_l, b_fade = block_softmax(b_s, b_m, b_l, scale2, 0, None)
        mbarrier.wait(v_full.index(step % V_STAGES), (step // V_STAGES) & 1)
        for i in range(1, steps):
            s_token, o_token = multiply(
                b_p, b_o, b_fade, q, k_s, v_s, k_full, None, None,
                (step + i) % STAGES, ((step + i) // STAGES) & 1, (step + i - 1) % V_STAGES, 0,
                G, BLOCK_K, HEAD_DIM, HEAD_DIM, False, s_layout, o_layout,
            )  # fmt: skip
            b_s = warpgroup_mma_wait(1, deps=(s_token,))
            mbarrier.arrive(k_empty.index((step + i) % STAGES), count=1)
            if i == steps - 1:  # the next queries come from far
                mbarrier.arrive(q_empty.index(G), count=1)
            # a branch instead of a loop of its own: half the code of a step, which is faster
            if i < masked:
                first = gl.load(starts + i) if LIST else run_start(i, runs, BLOCK_K)
                b_s = _hide(b_s, bounds, i, first, o_q, highest, LIST, BY_BLOCK, CAUSAL)
            b_p, b_m, b_l, b_fade = block_softmax(b_s, b_m, b_l, scale2, 0, None)
            b_o = multiplied(
                o_token, v_full, v_empty,
                (step + i) % V_STAGES, ((step + i) // V_STAGES) & 1, (step + i - 1) % V_STAGES,
            )  # fmt: skip
        step += steps
        slot_v = (step - 1) % V_STAGES
        b_p = gl.convert_layout(b_p.to(v_s.dtype), p_layout, assert_trivial=True)
        b_o = faded(b_o, b_fade)
        v = v_s.index(slot_v).reshape([BLOCK_K, HEAD_DIM])
        b_o = warpgroup_mma(b_p, v, b_o, is_async=True)

        i_own = i_h + (G if HEADS == 2 else 0)
        b_m, b_l, b_fade = denominator(b_m, b_l, sinks, i_own, rows, HAS_SINKS)
        # a row without keys
        b_scale = gl.where(b_l == 0.0, 0.0, b_fade / b_l)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_empty.index(slot_v), count=1)
        b_o = b_o * gl.convert_layout(b_scale, o_rows)[:, None]
        tma.store_wait(0)  # of the tile before this one, which left from the same place
        o_stage.reshape([_ROWS, HEAD_DIM]).store(b_o.to(o_s.dtype))
        fence_async_shared()
        async_store(p_o, [i_b, row + half, i_own, 0], o_stage)
        head = (i_b * place[3] * HEADS + i_own).to(gl.int64) * q_len
        b_row = row + o_q
        b_lse = (b_m + gl.log2(b_l)) * _LN2
        gl.store(lse + head + b_row, b_lse, mask=(b_row >= 0) & (b_row < q_len))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "tiles", "units", "section", "heads", "group", "q_len", "k_len", "origin", "first_tile",
        "block", "tiles_a_block", "anchor", "window", "last_queries", "heads_a_set", "sets",
        "capacity",
    ]
)  # fmt: skip
def key_walk_hopper_kernel(
    p_q, p_k, p_v, p_o, lse, sinks, head_windows, starts, counts, scale,
    tiles, units, section, heads, group, q_len, k_len,
    origin, first_tile, block, tiles_a_block, anchor, window, last_queries,
    heads_a_set, sets, capacity,
    HEADS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    LIST: gl.constexpr, CAUSAL: gl.constexpr, BY_BLOCK: gl.constexpr,
    HEAD_WINDOWS: gl.constexpr, HAS_SINKS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write ``out`` through ``p_o`` and ``lse``; see `longctx_triton.kernels.key_walk`.

    Descriptors of blocks ``[1, 64, 1, HEAD_DIM]`` (queries, out) and ``[1, BLOCK_K, 1, HEAD_DIM]``
    (keys, values). Grid: any number of programs up to ``tiles * units``; a tile is 128 rows of one
    head, or with HEADS 2 the same 64 rows of two. LIST takes the walk from ``starts`` int32
    ``[lists, capacity]`` and ``counts`` int32 ``[lists, 2]`` (masked steps, steps), else from the
    scalars. Values have a stage more than keys: theirs are read half a step longer. Bars of a
    stage: full when its copy has landed, empty when both consumers have read it.
    """
    dtype: gl.constexpr = p_q.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 1, _ROWS, 1, HEAD_DIM], p_q.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_K, 1, HEAD_DIM], p_k.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES + 1, 1, BLOCK_K, 1, HEAD_DIM], p_v.layout)
    o_s = gl.allocate_shared_memory(dtype, [2, 1, _ROWS, 1, HEAD_DIM], p_o.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)

    letter = gl.allocate_shared_memory(
        gl.int32, [2, _PLACES], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    bars = (q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, letter)
    sizes = (k_len - q_len, group)
    place = (tiles, units, section, heads // HEADS)
    lists = (starts, counts, heads_a_set, sets, tiles, capacity)
    ranges = (
        k_len, origin, first_tile, block, tiles_a_block, anchor, window, last_queries,
        head_windows,
    )  # fmt: skip
    plan = lists if LIST else ranges
    ours = (p_o, lse, sinks, o_s, scale, q_len, k_len - 1)
    gl.warp_specialize(
        [
            (_consume, (ours, bars, sizes, place, plan, 0, HEADS, BLOCK_K, HEAD_DIM, STAGES,
                        LIST, CAUSAL, BY_BLOCK, HEAD_WINDOWS, HAS_SINKS)),
            (_consume, (ours, bars, sizes, place, plan, 1, HEADS, BLOCK_K, HEAD_DIM, STAGES,
                        LIST, CAUSAL, BY_BLOCK, HEAD_WINDOWS, HAS_SINKS)),
            (_feed, (p_q, p_k, p_v, bars, sizes, place, plan, HEADS, BLOCK_K, STAGES,
                     LIST, BY_BLOCK, HEAD_WINDOWS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
