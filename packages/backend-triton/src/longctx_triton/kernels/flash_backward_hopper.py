"""Gradient of exact attention on Hopper in one pass over the scores, written in Gluon.

A program owns 128 keys and walks over the queries of a whole group of heads. Two warpgroups of 64
keys each sum dk and dv in registers, with scores transposed so that the weights are an operand
without leaving registers (FlashAttention-3, Shah et al., arXiv 2407.08608). A third one multiplies
the gradient of the scores, which the two leave in shared memory, with the keys and adds the
product to dq in global memory, in fp32 and in no fixed order; a warp copies queries and dout.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longctx_triton.compat import async_load, async_load_rows, async_store, barrier
from longctx_triton.kernels.flash_dq_products import ROWS, add_to_memory, times_keys
from longctx_triton.kernels.flash_hopper_softmax import hide

__all__ = ["KEYS", "ROWS", "flash_backward_hopper_kernel"]

KEYS = 64
"""Keys of one warpgroup; a program has two."""
_KEYS = gl.constexpr(KEYS)
_ROWS = gl.constexpr(ROWS)
_LOG2E = gl.constexpr(1.4426950408889634)
_ROW_PAIRS = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))
"""A number of each query, copied by one warp."""


@gluon.jit
def _locate(tiles, units, section, q_len, k_len, CAUSAL: gl.constexpr):
    """Return ``(unit, first key, first query block, query blocks of one head)``.

    Units are batch times KV heads. Tiles come longest first, section by section (heads whose
    queries fit the L2 cache together).
    """
    index = gl.program_id(0)
    first = index // (section * tiles) * section
    size = gl.minimum(section, units - first)
    inside = index - first * tiles
    key = inside // size * (2 * _KEYS)
    begin = 0
    if CAUSAL:
        begin = gl.maximum(key - (k_len - q_len), 0) // _ROWS
    return first + inside % size, key, begin, (q_len + _ROWS - 1) // _ROWS - begin


@gluon.jit
def _feed(
    p_q, p_dout, p_k, p_v, lse2, delta, common,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Copy keys and values, then queries and dout, block after block and head after head."""
    (
        q_s, dout_s, k_s, v_s, lse_s, delta_s, k_full, v_full, q_full, q_empty,
        dout_full, dout_empty, tiles, units, section, kv_heads, group, q_len, k_len, padded,
    ) = common  # fmt: skip
    unit, key, begin, blocks = _locate(tiles, units, section, q_len, k_len, CAUSAL)
    i_b = unit // kv_heads
    i_g = unit % kv_heads
    mbarrier.expect(k_full, 2 * p_k.block_type.nbytes)
    mbarrier.expect(v_full, 2 * p_v.block_type.nbytes)
    for g in gl.static_range(2):
        async_load(p_k, [i_b, key + g * _KEYS, i_g, 0], k_full, k_s.index(g))
    for g in gl.static_range(2):
        async_load(p_v, [i_b, key + g * _KEYS, i_g, 0], v_full, v_s.index(g))
    o_row = gl.arange(0, _ROWS, _ROW_PAIRS)
    for step in range(group * blocks):
        slot = step % STAGES
        phase = ((step // STAGES) & 1) ^ 1
        i_h = i_g * group + step // blocks
        row = (begin + step % blocks) * _ROWS
        o_first = (i_b * group * kv_heads + i_h).to(gl.int64) * padded + row
        mbarrier.wait(q_empty.index(slot), phase)
        mbarrier.expect(q_full.index(slot), p_q.block_type.nbytes)
        async_load(p_q, [i_b, row, i_h, 0], q_full.index(slot), q_s.index(slot))
        async_load_rows(lse_s.index(slot), lse2 + o_first + o_row)
        async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
        mbarrier.wait(dout_empty.index(slot), phase)
        mbarrier.expect(dout_full.index(slot), p_dout.block_type.nbytes)
        async_load(p_dout, [i_b, row, i_h, 0], dout_full.index(slot), dout_s.index(slot))
        async_load_rows(delta_s.index(slot), delta + o_first + o_row)
        async_copy.mbarrier_arrive(dout_full.index(slot), increment_count=False)


@gluon.jit
def _advance(
    b_dk, b_dv, k, v, k_parts, rings, step, masked, seen_from, scale2, p_sum,
    G: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr,
    ALONE: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Take block ``step`` of queries into dk and dv and leave the gradient of its scores.

    Key ``i`` sees queries from ``seen_from[i]`` on, counted from the block's first. Unless a
    warpgroup does so ALONE, add half the channels of the last block's product with the keys to
    its dq, which lies at ``p_sum``.
    """
    (
        q_s, dout_s, ds_s, lse_s, delta_s, q_full, q_empty, dout_full, dout_empty,
        ds_full, ds_empty,
    ) = rings  # fmt: skip
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    slot = step % STAGES
    phase = (step // STAGES) & 1
    turn = step if ALONE else step + 1  # the first turn of the others is empty
    left = turn % DS_STAGES
    b_zero = gl.zeros([_KEYS, _ROWS], gl.float32, s_layout)
    q = q_s.index(slot).reshape([_ROWS, HEAD_DIM])
    dout = dout_s.index(slot).reshape([_ROWS, HEAD_DIM])
    mbarrier.wait(q_full.index(slot), phase)
    s_token = warpgroup_mma(k, q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(slot), phase)
    dp_token = warpgroup_mma(v, dout.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=(s_token,))
    b_lse = lse_s.index(slot).load(columns)
    if masked:
        b_s = hide(b_s, seen_from, False)
    b_p = gl.exp2(b_s * scale2 - b_lse[None, :])
    b_w = gl.convert_layout(b_p.to(dout_s.dtype), p_layout, assert_trivial=True)
    # The assembler moves a bare wait for the product above the exponentials; it does not move
    # one across the branch of this wait.
    mbarrier.wait(ds_empty.index(left), ((turn // DS_STAGES) & 1) ^ 1)
    b_dp = warpgroup_mma_wait(0, deps=(dp_token,))
    dv_token = warpgroup_mma(b_w, dout, b_dv, is_async=True)
    b_ds = b_p * (b_dp - delta_s.index(slot).load(columns)[None, :])
    b_ds = b_ds.to(q_s.dtype)
    ds_s.index(2 * left + G).store(b_ds)
    fence_async_shared()
    barrier()
    mbarrier.arrive(ds_full.index(left), count=1)
    b_ds = gl.convert_layout(b_ds, p_layout, assert_trivial=True)
    if ALONE:
        dk_token = warpgroup_mma(b_ds, q, b_dk, is_async=True)
        b_dv = warpgroup_mma_wait(1, deps=(dv_token,))
        mbarrier.arrive(dout_empty.index(slot), count=1)
    else:
        last = step % DS_STAGES
        mbarrier.wait(ds_full.index(last), (step // DS_STAGES) & 1)
        dq_token = times_keys(ds_s, last, k_parts)
        dk_token = warpgroup_mma(b_ds, q, b_dk, is_async=True)
        b_dv = warpgroup_mma_wait(3, deps=(dv_token,))
        mbarrier.arrive(dout_empty.index(slot), count=1)
        b_dq = warpgroup_mma_wait(1, deps=(dq_token,))
        mbarrier.arrive(ds_empty.index(last), count=1)
        add_to_memory(p_sum, b_dq)
    b_dk = warpgroup_mma_wait(0, deps=(dk_token,))
    mbarrier.arrive(q_empty.index(slot), count=1)
    return b_dk, b_dv


@gluon.jit
def _sum_keys(
    p_dk, p_dv, dq_sums, rings, common, scale,
    G: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, ALONE: gl.constexpr,
):  # fmt: skip
    """Write dk and dv of keys ``[64 G, 64 G + 64)`` of the program's tile.

    Unless a warpgroup does so ALONE, add the channels of half G to dq.
    """
    (
        _q, _dout, k_s, v_s, _lse, _delta, k_full, v_full, _qf, _qe, _df, _de,
        tiles, units, section, kv_heads, group, q_len, k_len, padded,
    ) = common  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _ROWS, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    unit, key, begin, blocks = _locate(tiles, units, section, q_len, k_len, CAUSAL)
    key = key + G * _KEYS
    o_key = key + gl.arange(0, _KEYS, gl.SliceLayout(1, s_layout))
    # the first blocks of a head hide something, or with keys past the end all of them
    masked = gl.where(key + _KEYS > k_len, blocks, 0)
    seen_from = gl.where(o_key < k_len, 0, q_len)
    if CAUSAL:
        # the last key's first query sees all of them
        last = gl.maximum(key + _KEYS - 1 - (k_len - q_len), 0)
        masked = gl.minimum((last + _ROWS - 1) // _ROWS - begin, blocks)
        seen_from = o_key - (k_len - q_len)
    scale2 = scale * _LOG2E
    k = k_s.index(G).reshape([_KEYS, HEAD_DIM])
    v = v_s.index(G).reshape([_KEYS, HEAD_DIM])
    k_parts = (
        k_s.index(0).reshape([_KEYS, HEAD_DIM]).slice(G * HEAD_DIM // 2, HEAD_DIM // 2, 1),
        k_s.index(1).reshape([_KEYS, HEAD_DIM]).slice(G * HEAD_DIM // 2, HEAD_DIM // 2, 1),
    )
    ds_s, ds_full = rings[2], rings[9]
    b_dv = gl.zeros([_KEYS, HEAD_DIM], gl.float32, o_layout)
    head_blocks = padded // _ROWS
    row = unit * group * head_blocks + begin
    sums = dq_sums + G * (_ROWS * HEAD_DIM // 2)
    p_sum = sums + row.to(gl.int64) * (_ROWS * HEAD_DIM)
    if not ALONE:
        # the first block adds the product of zeros to its own dq
        ds_s.index(G).store(gl.zeros([_KEYS, _ROWS], ds_s.dtype, s_layout))
        fence_async_shared()
        barrier()
        mbarrier.arrive(ds_full.index(0), count=1)
    mbarrier.wait(k_full, 0)
    mbarrier.wait(v_full, 0)
    steps = group * blocks
    b_dk = gl.zeros([_KEYS, HEAD_DIM], gl.float32, o_layout)
    i = 0  # of this head's blocks
    for step in range(steps):
        b_dk, b_dv = _advance(
            b_dk, b_dv, k, v, k_parts, rings, step, i < masked,
            seen_from - (begin + i) * _ROWS, scale2, p_sum,
            G, HEAD_DIM, STAGES, DS_STAGES, ALONE, s_layout, o_layout,
        )  # fmt: skip
        p_sum = sums + (row + i).to(gl.int64) * (_ROWS * HEAD_DIM)
        i += 1
        if i == blocks:
            i = 0
            row += head_blocks
    if not ALONE:
        last = steps % DS_STAGES
        mbarrier.wait(ds_full.index(last), (steps // DS_STAGES) & 1)
        b_dq = times_keys(ds_s, last, k_parts)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
        add_to_memory(p_sum, b_dq)
    # the values of these keys were read by this warpgroup alone
    i_b = unit // kv_heads
    i_g = unit % kv_heads
    place = v_s.index(G)
    v.store(b_dv.to(v_s.dtype))
    fence_async_shared()
    barrier()
    async_store(p_dv, [i_b, key, i_g, 0], place)
    b_dk = (b_dk * scale).to(v_s.dtype)
    tma.store_wait(0)
    barrier()
    v.store(b_dk)
    fence_async_shared()
    barrier()
    async_store(p_dk, [i_b, key, i_g, 0], place)
    tma.store_wait(0)


@gluon.jit
def _sum_queries(
    dq_sums, rings, common,
    HEAD_DIM: gl.constexpr, DS_STAGES: gl.constexpr, WIDTH: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Add the program's part of dq, ``WIDTH`` channels at a time."""
    (
        _q, _dout, ds_s, _lse, _delta, _qf, _qe, _df, _de, ds_full, ds_empty,
    ) = rings  # fmt: skip
    (
        _q, _dout, k_s, _v, _lse, _delta, k_full, _vf, _qf, _qe, _df, _de,
        tiles, units, section, _kv_heads, group, q_len, k_len, padded,
    ) = common  # fmt: skip
    unit, _key, begin, blocks = _locate(tiles, units, section, q_len, k_len, CAUSAL)
    head_blocks = padded // _ROWS
    first = unit * group * head_blocks + begin
    k0 = k_s.index(0).reshape([_KEYS, HEAD_DIM])
    k1 = k_s.index(1).reshape([_KEYS, HEAD_DIM])
    mbarrier.wait(k_full, 0)
    for step in range(group * blocks):
        left = step % DS_STAGES
        block = first + step // blocks * head_blocks + step % blocks
        p_sum = dq_sums + block.to(gl.int64) * (_ROWS * HEAD_DIM)
        mbarrier.wait(ds_full.index(left), (step // DS_STAGES) & 1)
        for part in gl.static_range(HEAD_DIM // WIDTH):
            k_parts = (k0.slice(part * WIDTH, WIDTH, 1), k1.slice(part * WIDTH, WIDTH, 1))
            b_dq = times_keys(ds_s, left, k_parts)
            b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
            if part == HEAD_DIM // WIDTH - 1:
                mbarrier.arrive(ds_empty.index(left), count=1)
            add_to_memory(p_sum + part * WIDTH * _ROWS, b_dq)


@gluon.jit(do_not_specialize=["tiles", "units", "section", "kv_heads", "group", "q_len", "k_len"])
def flash_backward_hopper_kernel(
    p_q, p_dout, p_k, p_v, p_dk, p_dv, lse2, delta, dq_sums, scale,
    tiles, units, section, kv_heads, group, q_len, k_len, padded,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr, WIDTH: gl.constexpr,
    CAUSAL: gl.constexpr, ALONE: gl.constexpr,
    REGISTERS: gl.constexpr, DQ_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Sum dk and dv, and dq without its scale; ``p_*`` describe ``[B, S, H, D]``.

    ``lse2`` and ``delta`` are ``[B, Hq, padded]`` fp32 of `flash_delta_kernel`, padded to whole
    blocks. ``dq_sums``, zero at first, is ``[B, Hq, padded, D]`` fp32 with every block permuted as
    `add_to_memory` tells. Grid ``(tiles * units,)``: tiles of 128 keys, batch times KV heads.

    Bars of a stage: full when its copies have landed or all warps have written, empty when all
    readers have read it.
    """
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = p_q.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, _ROWS, 1, HEAD_DIM], p_q.layout)
    dout_s = gl.allocate_shared_memory(dtype, [STAGES, 1, _ROWS, 1, HEAD_DIM], p_dout.layout)
    k_s = gl.allocate_shared_memory(dtype, [2, 1, _KEYS, 1, HEAD_DIM], p_k.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, _KEYS, 1, HEAD_DIM], p_v.layout)
    ds_s = gl.allocate_shared_memory(dtype, [2 * DS_STAGES, _KEYS, _ROWS], plain)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, _ROWS], flat)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, _ROWS], flat)
    k_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    ds_full = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], bar)
    ds_empty = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], bar)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for i in gl.static_range(STAGES):
        # the bulk copy and each thread of the warp that copies a number of every query
        mbarrier.init(q_full.index(i), count=33)
        mbarrier.init(dout_full.index(i), count=33)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(dout_empty.index(i), count=2)
    for i in gl.static_range(DS_STAGES):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=1 if ALONE else 2)

    common = (
        q_s, dout_s, k_s, v_s, lse_s, delta_s, k_full, v_full, q_full, q_empty,
        dout_full, dout_empty, tiles, units, section, kv_heads, group, q_len, k_len, padded,
    )  # fmt: skip
    rings = (
        q_s, dout_s, ds_s, lse_s, delta_s, q_full, q_empty, dout_full, dout_empty,
        ds_full, ds_empty,
    )  # fmt: skip
    if ALONE:
        gl.warp_specialize(
            [
                (_sum_keys, (p_dk, p_dv, dq_sums, rings, common, scale, 0, HEAD_DIM, STAGES,
                             DS_STAGES, CAUSAL, ALONE)),
                (_sum_keys, (p_dk, p_dv, dq_sums, rings, common, scale, 1, HEAD_DIM, STAGES,
                             DS_STAGES, CAUSAL, ALONE)),
                (_sum_queries, (dq_sums, rings, common, HEAD_DIM, DS_STAGES, WIDTH, CAUSAL)),
                (_feed, (p_q, p_dout, p_k, p_v, lse2, delta, common, STAGES, CAUSAL)),
            ],
            [4, 4, 1],
            [REGISTERS, DQ_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_sum_keys, (p_dk, p_dv, dq_sums, rings, common, scale, 0, HEAD_DIM, STAGES,
                             DS_STAGES, CAUSAL, ALONE)),
                (_sum_keys, (p_dk, p_dv, dq_sums, rings, common, scale, 1, HEAD_DIM, STAGES,
                             DS_STAGES, CAUSAL, ALONE)),
                (_feed, (p_q, p_dout, p_k, p_v, lse2, delta, common, STAGES, CAUSAL)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
