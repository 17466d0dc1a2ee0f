"""Attention over key columns and diagonals on Hopper: warp-specialised, persistent, in Gluon.

The design and the inner step are those of `flash_hopper`: one warp copies, two warpgroups of 64
query rows multiply. A tile walks the bands of 128 keys that hold a kept distance (`stripe_bits`),
those that are kept in part before those that are kept whole, then the columns, which lie together
in a copy; a column inside a walked band counts there.
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

from longctx_triton.compat import async_load, async_store
from longctx_triton.kernels.flash_hopper import advance, copy_block, share
from longctx_triton.kernels.flash_hopper_softmax import (
    NOTHING_SEEN,
    ROW_THREADS,
    ROWS,
    block_softmax,
    denominator,
    faded,
)
from longctx_triton.kernels.key_walk import locate
from longctx_triton.kernels.stripe_bits import keep, kept_words

__all__ = ["stripe_walk_hopper_kernel"]

_ROWS = gl.constexpr(ROWS)
_BLOCK = gl.constexpr(2 * ROWS)
_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _set_of(i_b, i_h, plan):
    """Return the number of a head's set of stripes."""
    _, _, sets, heads_a_set, _, _, _ = plan
    return (i_b * sets + i_h // heads_a_set).to(gl.int64)


@gluon.jit
def _walk(i_b, i_h, p0, plan):
    """Return a tile's lists and ``(bands in part, whole bands, those that begin before key 0)``.

    Also how many columns lie before the tile. See `stripe_tables.stripe_tables_kernel`.
    """
    lists, _, _, _, groups, capacity, s_list = plan
    p_list = lists + _set_of(i_b, i_h, plan) * s_list
    reach = gl.maximum(p0 + _BLOCK - 1, 0) // _BLOCK
    p_below = p_list + capacity
    p_part = p_below + groups
    columns = gl.load(p_below + reach)
    part = gl.load(p_part + groups + reach)
    whole = gl.load(p_part + 3 * groups + reach)
    cut = whole - gl.load(p_part + 3 * groups + gl.maximum(p0, 0) // _BLOCK)
    return p_list, part, whole, cut, columns


@gluon.jit
def _band(p_list, i, part, whole, plan):
    """Load the band of step ``i``: those kept in part upwards, then the whole ones downwards."""
    groups, capacity = plan[4], plan[5]
    i = gl.minimum(i, part + whole)
    place = gl.where(i <= part, i - 1, 2 * groups + part + whole - i)
    return gl.load(p_list + capacity + groups + place)


@gluon.jit
def _feed(p_q, p_k, p_v, p_c, bars, sizes, place, plan, STAGES: gl.constexpr):
    """Copy queries, then the keys and values of each step, tile after tile."""
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    lag, group, heads_a_copy, batch = sizes
    step = 0
    for turn in range(share(place[0] * place[1])):
        i_b, i_h, i_t = locate(turn, place, 1)
        i_g = i_h // group
        i_c = i_h // heads_a_copy
        row = i_t * _BLOCK
        p0 = row + lag
        first = p0
        # the first keys need not wait until the last tile's queries are done with
        copy_block(p_k, i_b, first, i_g, k_s, k_full, k_empty, step, STAGES)
        p_list, part, whole, _, columns = _walk(i_b, i_h, p0, plan)
        coming = _band(p_list, 1, part, whole, plan)
        for g in gl.static_range(2):
            mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(g), p_q.block_type.nbytes)
            async_load(p_q, [i_b, row + g * _ROWS, i_h, 0], q_full.index(g), q_s.index(g))
        # a step's values are needed one step after its keys
        bands = 1 + part + whole
        for i in range(1, bands):
            here = p0 - coming * _BLOCK
            # a step ahead: the address is needed long after the stage is free
            coming = _band(p_list, i + 1, part, whole, plan)
            copy_block(p_k, i_b, here, i_g, k_s, k_full, k_empty, step + i, STAGES)
            copy_block(p_v, i_b, first, i_g, v_s, v_full, v_empty, step + i - 1, STAGES)
            first = here
        step += bands
        if columns > 0:
            copy_block(p_c, i_b, 0, i_c, k_s, k_full, k_empty, step, STAGES)
        copy_block(p_v, i_b, first, i_g, v_s, v_full, v_empty, step - 1, STAGES)
        for at in range(_BLOCK, columns, _BLOCK):
            step += 1
            copy_block(p_c, i_b, at, i_c, k_s, k_full, k_empty, step, STAGES)
            copy_block(p_c, batch + i_b, at - _BLOCK, i_c, v_s, v_full, v_empty, step - 1, STAGES)
        if columns > 0:
            last = (columns - 1) // _BLOCK * _BLOCK
            copy_block(p_c, batch + i_b, last, i_c, v_s, v_full, v_empty, step, STAGES)
            step += 1


@gluon.jit
def _consume(
    ours, bars, sizes, place, plan,
    G: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend for 64 rows of each of the program's tiles."""
    p_o, lse, o_s, scale, q_len = ours
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _BLOCK, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    scale2 = scale * _LOG2E
    half: gl.constexpr = G * _ROWS
    o_q = gl.arange(0, _ROWS, rows) + half
    q = q_s.index(G).reshape([_ROWS, HEAD_DIM])
    o_stage = o_s.index(G)
    _, tables, _, _, groups, capacity, _ = plan
    step = 0  # steps so far, over all tiles: it numbers the stages
    for turn in range(share(place[0] * place[1])):
        i_b, i_h, i_t = locate(turn, place, 1)
        row = i_t * _BLOCK
        p0 = row + sizes[0]
        p_list, part, whole, cut, columns = _walk(i_b, i_h, p0, plan)
        # two bitmaps of 4 (groups + 1) words
        p_table = tables + _set_of(i_b, i_h, plan) * 8 * (groups + 1)
        coming = _band(p_list, 1, part, whole, plan)
        b_m = gl.full([_ROWS], NOTHING_SEEN, gl.float32, rows)
        b_l = gl.zeros([_ROWS, 4], gl.float32, ROW_THREADS)
        b_o = gl.zeros([_ROWS, HEAD_DIM], gl.float32, o_layout)
        b_zero = gl.zeros([_ROWS, _BLOCK], gl.float32, s_layout)

        mbarrier.wait(q_full.index(G), turn & 1)
        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        k = k_s.index(slot).reshape([_BLOCK, HEAD_DIM])
        b_s = warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_kept = kept_words((p_table, 0, p0, groups, half), True, s_layout)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        b_s = keep(b_s, b_kept)
        # a later key has no distance, but may be a column
        b_p, b_m, b_l, b_fade = block_softmax(b_s, b_m, b_l, scale2, 0, o_q)
        mbarrier.wait(v_full.index(slot), (step // STAGES) & 1)
        bands = 1 + part + whole
        masked = 1 + part + cut
        for i in range(1, masked):
            band = (p_table, coming, p0, groups, half)
            coming = _band(p_list, i + 1, part, whole, plan)
            b_p, b_o, b_m, b_l, b_fade = advance(
                b_p, b_o, b_m, b_l, b_fade, q, k_s, v_s, k_full, k_empty, v_full, v_empty,
                None, None, step + i, 0, 0, None, band, True, scale2,
                G, _BLOCK, HEAD_DIM, HEAD_DIM, STAGES, False, s_layout, o_layout,
            )  # fmt: skip
        for i in range(masked, bands):
            b_p, b_o, b_m, b_l, b_fade = advance(
                b_p, b_o, b_m, b_l, b_fade, q, k_s, v_s, k_full, k_empty, v_full, v_empty,
                None, None, step + i, 0, 0, None, None, True, scale2,
                G, _BLOCK, HEAD_DIM, HEAD_DIM, STAGES, False, s_layout, o_layout,
            )  # fmt: skip
        step += bands
        p_listed = p_list + capacity + 5 * groups
        column_steps = (columns + _BLOCK - 1) // _BLOCK
        for i in range(column_steps):
            block = (p_list, p_listed, i, columns, p0)
            b_p, b_o, b_m, b_l, b_fade = advance(
                b_p, b_o, b_m, b_l, b_fade, q, k_s, v_s, k_full, k_empty, v_full, v_empty,
                None, None, step + i, 0, 0, None, block, False, scale2,
                G, _BLOCK, HEAD_DIM, HEAD_DIM, STAGES, False, s_layout, o_layout,
            )  # fmt: skip
        step += column_steps
        mbarrier.arrive(q_empty.index(G), count=1)
        slot_v = (step - 1) % STAGES
        b_p = gl.convert_layout(b_p.to(v_s.dtype), p_layout, assert_trivial=True)
        b_o = faded(b_o, b_fade)
        v = v_s.index(slot_v).reshape([_BLOCK, HEAD_DIM])
        b_o = warpgroup_mma(b_p, v, b_o, is_async=True)

        b_m, b_l, b_fade = denominator(b_m, b_l, None, i_h, rows, False)
        # a row without keys
        b_scale = gl.where(b_l == 0.0, 0.0, b_fade / b_l)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_empty.index(slot_v), count=1)
        b_o = b_o * gl.convert_layout(b_scale, o_rows)[:, None]
        tma.store_wait(0)  # of the tile before this one, which left from the same place
        o_stage.reshape([_ROWS, HEAD_DIM]).store(b_o.to(o_s.dtype))
        fence_async_shared()
        async_store(p_o, [i_b, row + half, i_h, 0], o_stage)
        head = (i_b * place[3] + i_h).to(gl.int64) * q_len
        gl.store(lse + head + row + o_q, (b_m + gl.log2(b_l)) * _LN2, mask=row + o_q < q_len)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "tiles", "units", "section", "heads", "group", "heads_a_copy", "batch", "q_len", "k_len",
        "sets", "heads_a_set", "groups", "capacity", "s_list",
    ]
)  # fmt: skip
def stripe_walk_hopper_kernel(
    p_q, p_k, p_v, p_o, p_c, lse, lists, tables, scale,
    tiles, units, section, heads, group, heads_a_copy, batch, q_len, k_len,
    sets, heads_a_set, groups, capacity, s_list,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write ``out`` through ``p_o`` and ``lse``; tables are those of `stripe_tables`.

    Descriptors of blocks ``[1, 64, 1, HEAD_DIM]`` (queries, out) and ``[1, 128, 1, HEAD_DIM]``
    (keys, values, and of the columns the keys of all batch entries, then the values). Grid: any
    number of programs up to ``tiles * units``; a tile is 128 rows of one head. Bars of a stage:
    full when its copy has landed, empty when both consumers have read it.
    """
    dtype: gl.constexpr = p_q.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 1, _ROWS, 1, HEAD_DIM], p_q.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, _BLOCK, 1, HEAD_DIM], p_k.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, _BLOCK, 1, HEAD_DIM], p_v.layout)
    o_s = gl.allocate_shared_memory(dtype, [2, 1, _ROWS, 1, HEAD_DIM], p_o.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)

    bars = (q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (k_len - q_len, group, heads_a_copy, batch)
    place = (tiles, units, section, heads)
    plan = (lists, tables, sets, heads_a_set, groups, capacity, s_list)
    ours = (p_o, lse, o_s, scale, q_len)
    gl.warp_specialize(
        [
            (_consume, (ours, bars, sizes, place, plan, 0, HEAD_DIM, STAGES)),
            (_consume, (ours, bars, sizes, place, plan, 1, HEAD_DIM, STAGES)),
            (_feed, (p_q, p_k, p_v, p_c, bars, sizes, place, plan, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
