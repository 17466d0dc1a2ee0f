"""Exact attention forward on Hopper: warp-specialised, persistent, written in Gluon.

FlashAttention-3 (Shah et al., arXiv 2407.08608): one warp feeds keys and values through the bulk
tensor copy engine, two or three warpgroups of 64 query rows each multiply. Within a warpgroup the
scores of one key block are computed while the last block's weights meet the values.
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
from longctx_triton.kernels.flash_hopper_softmax import (
    NOTHING_SEEN,
    ROW_THREADS,
    ROWS,
    block_softmax,
    denominator,
    faded,
)
from longctx_triton.kernels.stripe_bits import keep, kept_words

__all__ = [
    "ROWS", "advance", "copy_block", "flash_hopper_kernel", "multiplied", "multiply", "share",
]  # fmt: skip

_ROWS = gl.constexpr(ROWS)
_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def _depth(dtype):
    """Return how many channels one product of the tensor cores takes: 32 bytes."""
    return 256 // dtype.primitive_bitwidth


@gluon.jit
def share(total):
    """Return how many tiles this program gets when rounds run to and fro."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    rounds = total // programs
    slot = gl.where(rounds % 2 == 0, program, programs - 1 - program)
    return rounds + gl.where(slot < total - rounds * programs, 1, 0)


@gluon.jit
def _locate(
    turn, tiles, units, section, q_len, k_len,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Return ``(unit, first row, key blocks)`` of this program's tile number ``turn``.

    Tiles come longest first, section by section (heads that fit the L2 cache together); every
    other round runs backwards over the programs, so that each gets long and short ones.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    slot = gl.where(turn % 2 == 0, program, programs - 1 - program)
    index = turn * programs + slot
    first = index // (section * tiles) * section
    size = gl.minimum(section, units - first)
    inside = index - first * tiles
    tile = inside // size
    end = k_len
    if CAUSAL:
        tile = tiles - 1 - tile
        end = gl.minimum(tile * BLOCK_Q + BLOCK_Q + k_len - q_len, k_len)
    unit = first + inside % size
    return unit, tile * BLOCK_Q, (end + BLOCK_K - 1) // BLOCK_K


@gluon.jit
def copy_block(source, i_b, first, i_g, memory, full, empty, step, STAGES: gl.constexpr):
    """Start to copy block number ``step`` of keys or values once its stage is free."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), source.block_type.nbytes)
    async_load(source, [i_b, first, i_g, 0], full.index(slot), memory.index(slot))


@gluon.jit
def _feed(
    p_q, p_k, p_v, common,
    CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Copy queries, then keys and values from the last block to the first, tile after tile."""
    (
        q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        tiles, units, section, q_heads, group, q_len, k_len,
    ) = common  # fmt: skip
    step = 0
    for turn in range(share(tiles * units)):
        unit, row, blocks = _locate(
            turn, tiles, units, section, q_len, k_len,
            CONSUMERS * _ROWS, BLOCK_K, CAUSAL,
        )  # fmt: skip
        i_b = unit // q_heads
        i_h = unit % q_heads
        i_g = i_h // group
        # the first keys need not wait until the last tile's queries are done with
        copy_block(p_k, i_b, (blocks - 1) * BLOCK_K, i_g, k_s, k_full, k_empty, step, STAGES)
        for g in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(g), p_q.block_type.nbytes)
            async_load(p_q, [i_b, row + g * _ROWS, i_h, 0], q_full.index(g), q_s.index(g))
        # a block's values are needed one step after its keys
        for i in range(1, blocks):
            first = (blocks - 1 - i) * BLOCK_K
            copy_block(p_k, i_b, first, i_g, k_s, k_full, k_empty, step + i, STAGES)
            copy_block(p_v, i_b, first + BLOCK_K, i_g, v_s, v_full, v_empty, step + i - 1, STAGES)
        step += blocks
        copy_block(p_v, i_b, 0, i_g, v_s, v_full, v_empty, step - 1, STAGES)


@gluon.jit
def multiply(
    b_p, b_o, b_fade, q, k_s, v_s, k_full, mine, other, slot, phase, slot_v, beat,
    G: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    PING_PONG: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Start the scores of the keys in stage ``slot``, and weights times the values in ``slot_v``.

    The keys land in the stage's ``phase``; the values have landed, and ``b_o`` has still to fade
    by ``b_fade``.
    """
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    b_zero = gl.zeros([_ROWS, BLOCK_K], gl.float32, s_layout)
    mbarrier.wait(k_full.index(slot), phase)
    if PING_PONG:
        # one group multiplies while the other exponentiates; the first one starts unbidden
        mbarrier.wait(mine, (beat & 1) ^ (1 if G == 0 else 0))
    k = k_s.index(slot).reshape([BLOCK_K, HEAD_DIM])
    s_token = warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_p = gl.convert_layout(b_p.to(v_s.dtype), p_layout, assert_trivial=True)
    b_o = faded(b_o, b_fade)
    v = v_s.index(slot_v).reshape([BLOCK_K, VALUE_DIM])
    o_token = warpgroup_mma(b_p, v, b_o, is_async=True)
    if PING_PONG:
        mbarrier.arrive(other, count=1)
    return s_token, o_token


@gluon.jit
def multiplied(o_token, v_full, v_empty, slot, phase, last_slot):
    """Return what `multiply` made of the values in ``last_slot``, when those in ``slot`` are here.

    The assembler moves a bare wait for the product above the exponentials, and nothing overlaps;
    it does not move one across the branch of the wait for the values.
    """
    mbarrier.wait(v_full.index(slot), phase)
    b_o = warpgroup_mma_wait(0, deps=(o_token,))
    mbarrier.arrive(v_empty.index(last_slot), count=1)
    return b_o


@gluon.jit
def advance(
    b_p, b_o, b_m, b_l, b_fade, q, k_s, v_s, k_full, k_empty, v_full, v_empty, mine, other,
    step, beat, first, limits, kept, BANDS: gl.constexpr, scale2,
    G: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of block ``step`` while the weights of ``step - 1`` meet their values.

    ``limits`` (or None) are the last keys that the rows see, ``first`` the block's first; ``kept``
    (or None) is what `stripe_bits.kept_words` takes of a band or of columns.
    """
    slot = step % STAGES
    phase = (step // STAGES) & 1
    last_slot = (step - 1) % STAGES
    s_token, o_token = multiply(
        b_p, b_o, b_fade, q, k_s, v_s, k_full, mine, other, slot, phase, last_slot, beat,
        G, BLOCK_K, HEAD_DIM, VALUE_DIM, PING_PONG, s_layout, o_layout,
    )  # fmt: skip
    if kept is not None:
        b_kept = kept_words(kept, BANDS, s_layout)
    b_s = warpgroup_mma_wait(1, deps=(s_token,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    if kept is not None:
        b_s = keep(b_s, b_kept)
    b_p, b_m, b_l, b_fade = block_softmax(b_s, b_m, b_l, scale2, first, limits)
    b_o = multiplied(o_token, v_full, v_empty, slot, phase, last_slot)
    return b_p, b_o, b_m, b_l, b_fade


@gluon.jit
def _consume(
    ours, common,
    G: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_SINKS: gl.constexpr,
    PING_PONG: gl.constexpr,
):  # fmt: skip
    """Attend for rows ``[64 G, 64 G + 64)`` of each of the program's tiles."""
    p_o, lse, sinks, q_descale, k_descale, v_descale, o_s, beats, scale = ours
    (
        q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        tiles, units, section, q_heads, group, q_len, k_len,
    ) = common  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[4, 1],
        instr_shape=[16, BLOCK_K, _depth(q_s.dtype)],
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VALUE_DIM, 16]
    )
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    o_q = gl.arange(0, _ROWS, rows)
    q = q_s.index(G).reshape([_ROWS, HEAD_DIM])
    o_stage = o_s.index(G)
    mine = beats.index(G)
    other = beats.index((G + 1) % CONSUMERS)
    step = 0  # key blocks so far, over all tiles: it numbers the stages
    beat = 0
    for turn in range(share(tiles * units)):
        unit, row, blocks = _locate(
            turn, tiles, units, section, q_len, k_len,
            CONSUMERS * _ROWS, BLOCK_K, CAUSAL,
        )  # fmt: skip
        row = row + G * _ROWS
        scale2 = scale * _LOG2E
        if q_descale is not None:
            scale2 = scale2 * gl.load(q_descale + unit // group)
        if k_descale is not None:
            scale2 = scale2 * gl.load(k_descale + unit // group)
        if q_descale is not None or k_descale is not None:
            # a factor of 0 hides nothing, and 0 times -inf would be NaN
            scale2 = gl.maximum(scale2, 1e-30)
        limits = gl.full([_ROWS], k_len - 1, gl.int32, rows)
        whole = k_len // BLOCK_K  # blocks before this one need no mask
        if CAUSAL:
            limits = row + o_q + (k_len - q_len)
            whole = gl.minimum(row + k_len - q_len + 1, k_len) // BLOCK_K
        b_m = gl.full([_ROWS], NOTHING_SEEN, gl.float32, rows)
        b_l = gl.zeros([_ROWS, 4], gl.float32, ROW_THREADS)
        b_o = gl.zeros([_ROWS, VALUE_DIM], gl.float32, o_layout)
        b_zero = gl.zeros([_ROWS, BLOCK_K], gl.float32, s_layout)

        mbarrier.wait(q_full.index(G), turn & 1)
        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        k = k_s.index(slot).reshape([BLOCK_K, HEAD_DIM])
        b_s = warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        b_p, b_m, b_l, b_fade = block_softmax(
            b_s, b_m, b_l, scale2, (blocks - 1) * BLOCK_K, limits
        )  # fmt: skip
        mbarrier.wait(v_full.index(slot), (step // STAGES) & 1)
        # the first block is done: the next ones down to ``whole`` are masked, the rest are not
        masked_end = gl.maximum(blocks - whole, 1)
        if CAUSAL:
            for i in range(1, masked_end):
                b_p, b_o, b_m, b_l, b_fade = advance(
                    b_p, b_o, b_m, b_l, b_fade, q, k_s, v_s, k_full, k_empty, v_full, v_empty,
                    mine, other, step + i, beat, (blocks - 1 - i) * BLOCK_K, limits, None, True,
                    scale2, G, BLOCK_K, HEAD_DIM, VALUE_DIM, STAGES, PING_PONG,
                    s_layout, o_layout,
                )  # fmt: skip
                beat += 1
        for i in range(masked_end, blocks):
            b_p, b_o, b_m, b_l, b_fade = advance(
                b_p, b_o, b_m, b_l, b_fade, q, k_s, v_s, k_full, k_empty, v_full, v_empty,
                mine, other, step + i, beat, 0, None, None, True, scale2,
                G, BLOCK_K, HEAD_DIM, VALUE_DIM, STAGES, PING_PONG,
                s_layout, o_layout,
            )  # fmt: skip
            beat += 1
        mbarrier.arrive(q_empty.index(G), count=1)
        step += blocks
        slot_v = (step - 1) % STAGES
        b_p = gl.convert_layout(b_p.to(v_s.dtype), p_layout, assert_trivial=True)
        b_o = faded(b_o, b_fade)
        v = v_s.index(slot_v).reshape([BLOCK_K, VALUE_DIM])
        b_o = warpgroup_mma(b_p, v, b_o, is_async=True)

        i_b = unit // q_heads
        i_h = unit % q_heads
        b_m, b_l, b_fade = denominator(b_m, b_l, sinks, i_h, rows, HAS_SINKS)
        b_scale = b_fade / b_l
        if v_descale is not None:
            b_scale = b_scale * gl.load(v_descale + unit // group)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_empty.index(slot_v), count=1)
        b_o = b_o * gl.convert_layout(b_scale, o_rows)[:, None]
        tma.store_wait(0)  # of the tile before this one, which left from the same place
        o_stage.reshape([_ROWS, VALUE_DIM]).store(b_o.to(o_s.dtype))
        fence_async_shared()
        async_store(p_o, [i_b, row, i_h, 0], o_stage)
        head = unit.to(gl.int64) * q_len
        gl.store(lse + head + row + o_q, (b_m + gl.log2(b_l)) * _LN2, mask=row + o_q < q_len)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "units", "section", "q_heads", "group", "q_len", "k_len"])
def flash_hopper_kernel(
    p_q, p_k, p_v, p_o, lse, sinks, q_descale, k_descale, v_descale, scale,
    tiles, units, section, q_heads, group, q_len, k_len,
    CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_SINKS: gl.constexpr, PING_PONG: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attend: ``p_*`` describe ``[B, S, H, D]``, every row sees a key, the scale is positive.

    Grid: any number of programs up to ``tiles * units`` (query tiles of ``64 CONSUMERS``
    rows, batch times query heads). Bars of a stage: full when its copy has landed, empty when all
    consumers have read it.
    """
    q_s = gl.allocate_shared_memory(p_q.dtype, [CONSUMERS, 1, _ROWS, 1, HEAD_DIM], p_q.layout)
    k_s = gl.allocate_shared_memory(p_k.dtype, [STAGES, 1, BLOCK_K, 1, HEAD_DIM], p_k.layout)
    v_s = gl.allocate_shared_memory(p_v.dtype, [STAGES, 1, BLOCK_K, 1, VALUE_DIM], p_v.layout)
    o_s = gl.allocate_shared_memory(p_o.dtype, [CONSUMERS, 1, _ROWS, 1, VALUE_DIM], p_o.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    beats = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(beats.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)

    common = (
        q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        tiles, units, section, q_heads, group, q_len, k_len,
    )  # fmt: skip
    ours = (p_o, lse, sinks, q_descale, k_descale, v_descale, o_s, beats, scale)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (ours, common, 0, CONSUMERS, BLOCK_K, HEAD_DIM, VALUE_DIM, STAGES,
                            CAUSAL, HAS_SINKS, PING_PONG)),
                (_consume, (ours, common, 1, CONSUMERS, BLOCK_K, HEAD_DIM, VALUE_DIM, STAGES,
                            CAUSAL, HAS_SINKS, PING_PONG)),
                (_feed, (p_q, p_k, p_v, common, CONSUMERS, BLOCK_K, STAGES, CAUSAL)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (ours, common, 0, CONSUMERS, BLOCK_K, HEAD_DIM, VALUE_DIM, STAGES,
                            CAUSAL, HAS_SINKS, PING_PONG)),
                (_consume, (ours, common, 1, CONSUMERS, BLOCK_K, HEAD_DIM, VALUE_DIM, STAGES,
                            CAUSAL, HAS_SINKS, PING_PONG)),
                (_consume, (ours, common, 2, CONSUMERS, BLOCK_K, HEAD_DIM, VALUE_DIM, STAGES,
                            CAUSAL, HAS_SINKS, PING_PONG)),
                (_feed, (p_q, p_k, p_v, common, CONSUMERS, BLOCK_K, STAGES, CAUSAL)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
