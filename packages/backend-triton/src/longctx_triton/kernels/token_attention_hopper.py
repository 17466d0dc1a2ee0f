"""Causal attention inside token sets on Hopper: warp-specialised, persistent, written in Gluon.

The inner step is that of `flash_hopper`, and two warpgroups of 64 query slots each take it. The
copy engine cannot follow an index: four warps gather the rows of queries, keys and values with
ordinary copies, and the results are scattered to their rows. A set is ascending, so causality
between its slots is causality between its tokens.

Sets differ in size, which is known on the device alone: the gathering warps claim tiles, the
longest of a head first, from a counter in memory, and tell those that multiply.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longctx_triton.compat import async_load_rows
from longctx_triton.kernels.flash_hopper import advance
from longctx_triton.kernels.flash_hopper_softmax import (
    NOTHING_SEEN,
    ROW_THREADS,
    ROWS,
    block_softmax,
    denominator,
    faded,
)
from longctx_triton.kernels.mailbox import PLACES, hear, tell

__all__ = ["token_attention_hopper_kernel"]

_ROWS = gl.constexpr(ROWS)
_TILE = gl.constexpr(2 * ROWS)
"""Query slots of a tile, and key slots of a step: only a tile's first step has a triangle."""
_LN2 = gl.constexpr(0.6931471805599453)
_GATHER_THREADS = gl.constexpr(128)
_PLACES = gl.constexpr(PLACES)
_COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""A warp copies 128 bytes of four rows at a time: a thread sees few rows, so few addresses."""
_LISTED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[16], [32], [64], [1], [2]],
        warp_bases=[[4], [8]],
        block_bases=[],
        shape=[2 * ROWS],
    )
)
"""A slot a thread, in the warp that copies its row in `_COPIED`."""
_LENGTHS = [
    "s_ib", "s_ih", "s_cb", "tiles", "units", "heads", "group", "heads_a_set",
    "capacity", "q_len", "k_len",
]  # fmt: skip


@gluon.jit
def _place(task, place):
    """Return ``(batch entry, head, tile)`` of a task; a head's last tiles, the longest, first."""
    tiles, _, heads, _ = place
    unit = task // tiles
    return unit // heads, unit % heads, tiles - 1 - task % tiles


@gluon.jit
def _set_of(i_b, i_h, sets):
    """Return a head's set and its number of slots."""
    indices, counts, s_ib, s_ih, s_cb, heads_a_set, capacity = sets
    i_x = i_h // heads_a_set
    p_set = indices + i_b.to(gl.int64) * s_ib + i_x.to(gl.int64) * s_ih
    count = gl.load(counts + i_b.to(gl.int64) * s_cb + i_x)
    return p_set, gl.maximum(gl.minimum(count, capacity), 0)


@gluon.jit
def _claim(sets, place, oldest):
    """Return a task that nobody else has, and that has a query; past the last one, there is none.

    ``oldest`` is the first token with a query.
    """
    tiles, units, _, counter = place
    task = gl.atomic_add(counter, 1, sem="relaxed")
    searching = task < tiles * units
    while searching:
        i_b, i_h, i_t = _place(task, place)
        p_set, count = _set_of(i_b, i_h, sets)
        used = (count + _TILE - 1) // _TILE
        last = gl.load(p_set + gl.maximum(gl.minimum(i_t * _TILE + _TILE, count) - 1, 0))
        unused = i_t >= used
        searching = unused | ((last >= 0) & (last < oldest))
        if searching:
            # nobody needs this head's tasks before its last tile in use, or after one too old
            gl.atomic_max(counter, task + 1 + gl.where(unused, i_t - used, i_t), sem="relaxed")
            task = gl.atomic_add(counter, 1, sem="relaxed")
            searching = task < tiles * units
    return task


@gluon.jit
def _listed(p_set, o_s, count, k_len):
    """Return the tokens in slots ``o_s``, -1 where there is none."""
    b_n = gl.load(p_set + o_s, mask=o_s < count, other=-1)
    return gl.where(b_n < k_len, b_n, -1)


@gluon.jit
def _gather(
    tensors, sets, place, lengths, memory, mail,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy query rows, then the key and value rows of each step, tile after tile."""
    q, s_qb, s_qn, s_qh, k, s_kb, s_kn, s_kh, v, s_vb, s_vn, s_vh = tensors
    q_len, k_len, oldest, group = lengths
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    o_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, _COPIED))[None, :]
    o_key = gl.arange(0, _TILE, _LISTED)
    o_query = gl.arange(0, _ROWS, gl.SliceLayout(1, _COPIED))
    step = 0
    done = 0
    tiles, units, _, _ = place
    task = _claim(sets, place, oldest)
    while task < tiles * units:
        tell(done, task, mail, _LISTED)
        i_b, i_h, i_t = _place(task, place)
        p_set, count = _set_of(i_b, i_h, sets)
        b_n = _listed(p_set, i_t * _TILE + o_key, count, k_len)
        i_g = (i_h // group).to(gl.int64)
        p_q = q + i_b.to(gl.int64) * s_qb + i_h.to(gl.int64) * s_qh
        p_k = k + i_b.to(gl.int64) * s_kb + i_g * s_kh
        p_v = v + i_b.to(gl.int64) * s_vb + i_g * s_vh
        for g in gl.static_range(2):
            b_q = _listed(p_set, i_t * _TILE + g * _ROWS + o_query, count, k_len)
            m_q = b_q >= oldest
            b_q = gl.where(m_q, b_q - (k_len - q_len), 0)
            mbarrier.wait(q_empty.index(g), (done & 1) ^ 1)
            async_load_rows(
                q_s.index(g), p_q + b_q.to(gl.int64)[:, None] * s_qn + o_d, mask=m_q[:, None]
            )
            async_copy.mbarrier_arrive(q_full.index(g), increment_count=False)
        for i in range(i_t + 1):
            slot = step % STAGES
            parity = ((step // STAGES) & 1) ^ 1
            b_copied = gl.convert_layout(b_n, gl.SliceLayout(1, _COPIED))
            m_n = (b_copied >= 0)[:, None]
            b_row = b_copied.to(gl.int64)[:, None]
            mbarrier.wait(k_empty.index(slot), parity)
            async_load_rows(k_s.index(slot), p_k + b_row * s_kn + o_d, mask=m_n)
            async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
            # a step ahead: its address is needed as soon as the stage is free
            b_next = _listed(p_set, gl.maximum(i_t - 1 - i, 0) * _TILE + o_key, count, k_len)
            mbarrier.wait(v_empty.index(slot), parity)
            async_load_rows(v_s.index(slot), p_v + b_row * s_vn + o_d, mask=m_n)
            async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)
            b_n = b_next
            step += 1
        done += 1
        task = _claim(sets, place, oldest)
    tell(done, -1, mail, _LISTED)


@gluon.jit
def _consume(
    results, sets, place, lengths, memory, mail,
    G: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend for slots ``[64 G, 64 G + 64)`` of each of the program's tiles."""
    out, lse, heads, scale_log2 = results
    q_len, k_len, oldest, _ = lengths
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _TILE, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    o_q = gl.arange(0, _ROWS, rows) + G * _ROWS
    q = q_s.index(G)
    step = 0  # steps so far, over all tiles: it numbers the stages
    done = 0
    task = hear(done, mail)
    while task >= 0:
        i_b, i_h, i_t = _place(task, place)
        p_set, count = _set_of(i_b, i_h, sets)
        b_m = gl.full([_ROWS], NOTHING_SEEN, gl.float32, rows)
        b_l = gl.zeros([_ROWS, 4], gl.float32, ROW_THREADS)
        b_o = gl.zeros([_ROWS, HEAD_DIM], gl.float32, o_layout)
        b_zero = gl.zeros([_ROWS, _TILE], gl.float32, s_layout)

        mbarrier.wait(q_full.index(G), done & 1)
        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        # what was copied by ordinary instructions is read by those of the tensor cores
        fence_async_shared()
        k = k_s.index(slot)
        b_s = warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        # the tile's own slots; those of all further steps come before them
        b_p, b_m, b_l, b_fade = block_softmax(b_s, b_m, b_l, scale_log2, 0, o_q)
        mbarrier.wait(v_full.index(slot), (step // STAGES) & 1)
        for i in range(step + 1, step + 1 + i_t):
            mbarrier.wait(k_full.index(i % STAGES), (i // STAGES) & 1)
            fence_async_shared()
            b_p, b_o, b_m, b_l, b_fade = advance(
                b_p, b_o, b_m, b_l, b_fade, q, k_s, v_s, k_full, k_empty, v_full, v_empty,
                None, None, i, 0, 0, None, None, True, scale_log2,
                G, _TILE, HEAD_DIM, HEAD_DIM, STAGES, False,
                s_layout, o_layout,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(G), count=1)
        step += i_t + 1
        done += 1
        slot = (step - 1) % STAGES
        fence_async_shared()
        b_p = gl.convert_layout(b_p.to(v_s.dtype), p_layout, assert_trivial=True)
        b_o = faded(b_o, b_fade)
        b_o = warpgroup_mma(b_p, v_s.index(slot), b_o, is_async=True)

        o_slot = i_t * _TILE + o_q
        b_row = _listed(p_set, o_slot, count, k_len)
        m_row = b_row >= oldest
        b_row -= k_len - q_len
        head = i_b * heads + i_h
        b_m, b_l, b_fade = denominator(b_m, b_l, None, i_h, rows, False)
        p_lse = lse + head.to(gl.int64) * q_len
        gl.store(p_lse + b_row, (b_m + gl.log2(b_l)) * _LN2, mask=m_row)
        b_scale = gl.convert_layout(b_fade / b_l, o_rows)
        b_row = gl.convert_layout(b_row, o_rows)
        m_row = gl.convert_layout(m_row, o_rows)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        b_o = (b_o * b_scale[:, None]).to(out.dtype.element_ty)
        p_out = out + i_b.to(gl.int64) * q_len * heads * HEAD_DIM + i_h * HEAD_DIM
        p_out = p_out + (b_row.to(gl.int64) * (heads * HEAD_DIM))[:, None]
        o_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))[None, :]
        gl.store(p_out + o_d, b_o, mask=m_row[:, None])
        task = hear(done, mail)


@gluon.jit(do_not_specialize=_LENGTHS)
def token_attention_hopper_kernel(
    q, k, v, out, lse, indices, counts, counter,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_ib, s_ih, s_cb,
    tiles, units, heads, group, heads_a_set, capacity, q_len, k_len, scale_log2,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attend: q, k, v ``[B, S, H, HEAD_DIM]``, indices ``[B, Hx, C]`` and counts ``[B, Hx]``.

    Writes the rows of chosen tokens into contiguous out ``[B, Sq, Hq, HEAD_DIM]`` and fp32 lse
    ``[B, Hq, Sq]``. The scale is positive. A task is one of ``tiles`` of 128 of the C slots for
    one of ``units``, batch times query heads; the grid is any number of programs. The counter of
    claimed tasks is 0 before the kernel. Bars of a stage: full when the copies of all gathering
    threads have landed, empty when both consumers have read it.
    """
    dtype: gl.constexpr = k.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(dtype, [2, _ROWS, HEAD_DIM], layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, _TILE, HEAD_DIM], layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, _TILE, HEAD_DIM], layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    tasks = gl.allocate_shared_memory(
        gl.int32, [2, _PLACES], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    told = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
        mbarrier.init(q_full.index(i), count=_GATHER_THREADS)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=_GATHER_THREADS)
        mbarrier.init(v_full.index(i), count=_GATHER_THREADS)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)

    tensors = (q, s_qb, s_qn, s_qh, k, s_kb, s_kn, s_kh, v, s_vb, s_vn, s_vh)
    sets = (indices, counts, s_ib, s_ih, s_cb, heads_a_set, capacity)
    place = (tiles, units, heads, counter)
    mail = (tasks, told, heard)
    lengths = (q_len, k_len, gl.maximum(k_len - q_len, 0), group)
    memory = (q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    results = (out, lse, heads, scale_log2)
    gl.warp_specialize(
        [
            (_consume, (results, sets, place, lengths, memory, mail, 0, HEAD_DIM, STAGES)),
            (_consume, (results, sets, place, lengths, memory, mail, 1, HEAD_DIM, STAGES)),
            (_gather, (tensors, sets, place, lengths, memory, mail, HEAD_DIM, STAGES)),
        ],
        [4, 4],
        [REGISTERS, GATHER_REGISTERS],
    )
