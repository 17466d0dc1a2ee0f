"""Attention over listed keys on Hopper for absorbed MLA, whose values are part of its keys.

Persistent and warp-specialised, written in Gluon. A tile is 64 query heads of one token, or of one
part of its list. One warpgroup gathers the listed keys, one multiplies them with the queries and
takes the softmax, two multiply the weights with the values, 256 channels each. They meet only in
the stages of a ring of key blocks, so that the tensor cores have the values' products of one block
while the weights of the next one are made.
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

from longctx_triton.compat import async_load_rows, barrier
from longctx_triton.kernels.flash_hopper_softmax import ROW_THREADS
from longctx_triton.kernels.mailbox import PLACES, hear, tell

__all__ = ["HALF", "HEADS", "REST", "latent_hopper_kernel"]

HEADS = 64
"""Query heads of a tile: the rows that a warpgroup multiplies."""
HALF = 256
"""Channels of half the values."""
REST = 64
"""Channels of a key behind its value."""

_HEADS = gl.constexpr(HEADS)
_HALF = gl.constexpr(HALF)
_REST = gl.constexpr(REST)
_GATHER_THREADS = gl.constexpr(128)
_PLACES = gl.constexpr(PLACES)
_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)
_VALUES = gl.constexpr(
    # products of 256 columns need more registers than ptxas plans for threads of 16 warps
    gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF // 2, 16]
    )
)
_FIRST_THREAD = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [HEADS, 1]
    )
)
"""Layout of rows, all that share one reading the same: `ROW_THREADS` without its columns."""
_WRITTEN = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[HEADS, HALF],
    )
)
"""The rows of a warp are those of `_VALUES`, but a thread has 16 bytes (half precision) of one."""
_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""A warp copies 128 bytes of four rows at a time: a thread sees few rows, so few addresses."""
_LIST = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
_ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_LENGTHS = [
    "s_ib", "s_in", "total", "tokens", "q_len", "k_len", "heads", "head_tiles", "slots", "span",
]  # fmt: skip


@gluon.jit
def _count(total):
    """Return how many tiles this program gets."""
    return (total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _locate(turn, tokens, head_tiles):
    """Return ``(tile of heads, token over the batch, part)`` of this program's tile ``turn``.

    The head tiles of a token, which gather the same keys, are neighbours.
    """
    index = turn * gl.num_programs(0) + gl.program_id(0)
    unit = index // head_tiles
    return index % head_tiles, unit % tokens, unit // tokens


@gluon.jit
def _list_of(lists, i_token, i_part):
    """Return the first address of a part's list, the number of its slots, and that of keys."""
    indices, s_ib, s_in, q_len, k_len, slots, span = lists
    i_b = (i_token // q_len).to(gl.int64)
    i_i = (i_token % q_len).to(gl.int64)
    first = i_part * span
    return indices + i_b * s_ib + i_i * s_in + first, gl.minimum(slots - first, span), k_len


@gluon.jit
def _listed(p_list, o_s, size, k_len):
    """Return the keys in slots ``o_s``, negative where there is none."""
    b_n = gl.load(p_list + o_s, mask=o_s < size, other=-1)
    return gl.where(b_n < k_len, b_n, -1)


@gluon.jit
def _put(fades, b_fade):
    """Store a factor of each row, of the scores' layout; each thread a place (see `mailbox`)."""
    b_fade = gl.convert_layout(b_fade, gl.SliceLayout(1, ROW_THREADS), assert_trivial=True)
    fades.store(b_fade[:, None] + gl.zeros([_HEADS, 4], gl.float32, ROW_THREADS))


@gluon.jit
def _factors(fades):
    """Return the factor of each row, ``[64, 1]``, for the values' layout."""
    b_fade = gl.max(fades.slice(0, 1, 1).load(_FIRST_THREAD), 1)
    rows: gl.constexpr = gl.SliceLayout(1, _VALUES)
    return gl.convert_layout(b_fade, rows, assert_trivial=True)[:, None]


@gluon.jit
def _copy(memory, pointers, mask):
    """Start to copy rows; those off the mask become 0, whatever stands in their place."""
    async_load_rows(memory, pointers, mask=mask)


@gluon.jit
def _gather(
    tensors, lists, tiles, sizing, q_s, k_s, k_empty,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, LOOK: gl.constexpr,
):  # fmt: skip
    """Copy queries and listed keys, tile after tile."""
    q, s_qb, s_qn, s_qh, k, s_kb, s_kn = tensors
    total, tokens, heads, head_tiles, q_len = tiles
    ql_s, qr_s, qt_s, q_full, q_empty = q_s
    kl_s, kr_s, kt_s, left_full, k_full = k_s
    o_wide = gl.arange(0, _HALF, gl.SliceLayout(0, _ROWS))
    o_rest = gl.arange(0, _REST, gl.SliceLayout(0, _ROWS))
    o_row = gl.arange(0, BLOCK, gl.SliceLayout(1, _ROWS))
    o_head = gl.arange(0, _HEADS, gl.SliceLayout(1, _ROWS))
    o_look = gl.arange(0, LOOK, _LIST)
    step = 0
    for turn in range(_count(total)):
        i_t, i_token, i_part = _locate(turn, tokens, head_tiles)
        p_list, size, k_len = _list_of(lists, i_token, i_part)
        # a tile ends with the last slot that names a key
        b_end = gl.zeros([LOOK], gl.int32, _LIST)
        for u0 in range(0, size, LOOK):
            b_u = _listed(p_list, u0 + o_look, size, k_len)
            b_end = gl.maximum(b_end, gl.where(b_u >= 0, u0 + o_look + 1, 0))
        size = gl.max(b_end, 0)
        blocks = (size + BLOCK - 1) // BLOCK
        tell(turn, blocks, sizing, _ONE)

        b_n = _listed(p_list, o_row, size, k_len)
        i_b = (i_token // q_len).to(gl.int64)
        i_i = (i_token % q_len).to(gl.int64)
        o_h = i_t * _HEADS + o_head
        m_head = (o_h < heads)[:, None]
        p_head = (q + i_b * s_qb + i_i * s_qn + o_h.to(gl.int64) * s_qh)[:, None]
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        _copy(ql_s, p_head + o_wide[None, :], m_head)
        _copy(qr_s, p_head + (_HALF + o_wide)[None, :], m_head)
        _copy(qt_s, p_head + (2 * _HALF + o_rest)[None, :], m_head)
        async_copy.mbarrier_arrive(q_full, increment_count=False)

        for i in range(blocks):
            slot = step % STAGES
            m_key = (b_n >= 0)[:, None]
            p_key = (k + i_b * s_kb + b_n.to(gl.int64) * s_kn)[:, None]
            mbarrier.wait(k_empty.index(slot), ((step // STAGES) & 1) ^ 1)
            _copy(kl_s.index(slot), p_key + o_wide[None, :], m_key)
            async_copy.mbarrier_arrive(left_full.index(slot), increment_count=False)
            _copy(kr_s.index(slot), p_key + (_HALF + o_wide)[None, :], m_key)
            _copy(kt_s.index(slot), p_key + (2 * _HALF + o_rest)[None, :], m_key)
            async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
            b_n = _listed(p_list, (i + 1) * BLOCK + o_row, size, k_len)
            step += 1


@gluon.jit
def _multiply(
    q_s, k_s, step,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Start the products of the queries with block ``step`` as its channels land."""
    ql_s, qr_s, qt_s = q_s
    kl_s, kr_s, kt_s, left_full, k_full = k_s
    slot = step % STAGES
    phase = (step // STAGES) & 1
    b_zero = gl.zeros([_HEADS, BLOCK], gl.float32, layout)
    mbarrier.wait(left_full.index(slot), phase)
    # what was copied by ordinary instructions is read by those of the tensor cores
    fence_async_shared()
    kl = kl_s.index(slot).permute((1, 0))
    b_s = warpgroup_mma(ql_s, kl, b_zero, use_acc=False, is_async=True)
    mbarrier.wait(k_full.index(slot), phase)
    fence_async_shared()
    kr = kr_s.index(slot).permute((1, 0))
    kt = kt_s.index(slot).permute((1, 0))
    b_s = warpgroup_mma(qr_s, kr, b_s, is_async=True)
    return warpgroup_mma(qt_s, kt, b_s, is_async=True)


@gluon.jit
def _pass_on(b_s, b_n, b_m, b_l, scale_log2, weights, slot):
    """Take a block's scores into maximum and sum; give away weights and what fades older sums."""
    p_s, fades, p_full = weights
    b_s = gl.where((b_n >= 0)[None, :], b_s, float("-inf"))
    b_top = gl.maximum(b_m, gl.max(b_s, 1) * scale_log2)
    # a row that has seen nothing yet: -inf less -inf would be NaN
    b_shift = gl.where(b_top == float("-inf"), 0.0, b_top)
    b_p = gl.exp2(b_s * scale_log2 - b_shift[:, None])
    b_fade = gl.exp2(b_m - b_shift)
    # the weights take the place of channels that only the scores read: all warps have done so
    barrier()
    p_s.index(slot).store(b_p.to(p_s.dtype))
    _put(fades.index(slot), b_fade)
    fence_async_shared()
    barrier()
    mbarrier.arrive(p_full.index(slot), count=1)
    return b_top, b_l * b_fade + gl.sum(b_p, 1)


@gluon.jit
def _score(
    results, scale_log2, lists, tiles, sizing, q_s, k_s, weights, last,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """Multiply queries with keys and pass on weights, then what divides the sums; write lse."""
    lse, sinks = results
    total, tokens, heads, head_tiles, q_len = tiles
    ql_s, qr_s, qt_s, q_full, q_empty = q_s
    queries = (ql_s, qr_s, qt_s)
    fades, last_full, last_empty = last
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    o_col = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    o_row = gl.arange(0, _HEADS, rows)
    step = 0
    for turn in range(_count(total)):
        i_t, i_token, i_part = _locate(turn, tokens, head_tiles)
        p_list, size, k_len = _list_of(lists, i_token, i_part)
        blocks = hear(turn, sizing)
        b_m = gl.full([_HEADS], float("-inf"), gl.float32, rows)
        b_l = gl.zeros([_HEADS], gl.float32, rows)
        mbarrier.wait(q_full, turn & 1)
        for i in range(blocks):
            b_s = _multiply(queries, k_s, step, BLOCK, STAGES, layout)
            # a fence waits for loads: this one runs beside the products, not before them
            b_n = _listed(p_list, i * BLOCK + o_col, size, k_len)
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            b_m, b_l = _pass_on(b_s, b_n, b_m, b_l, scale_log2, weights, step % STAGES)
            step += 1
        barrier()
        mbarrier.arrive(q_empty, count=1)

        o_h = i_t * _HEADS + o_row
        m_h = o_h < heads
        b_scale = gl.full([_HEADS], 1.0, gl.float32, rows)
        if HAS_SINKS:
            b_sink = gl.load(sinks + o_h, mask=m_h, other=0.0).to(gl.float32) * _LOG2E
            b_top = gl.maximum(b_m, b_sink)
            b_shift = gl.where(b_top == float("-inf"), 0.0, b_top)
            b_scale = gl.exp2(b_m - b_shift)
            b_l = b_l * b_scale + gl.exp2(b_sink - b_shift)
            b_m = b_top
        b_whole = gl.where(b_l == 0.0, 1.0, b_l)
        mbarrier.wait(last_empty, (turn & 1) ^ 1)
        _put(fades.index(STAGES), b_scale / b_whole)
        barrier()
        mbarrier.arrive(last_full, count=1)
        b_log = gl.where(b_l == 0.0, float("-inf"), (b_m + gl.log2(b_whole)) * _LN2)
        i_sequence = i_part.to(gl.int64) * (tokens // q_len) + i_token // q_len
        o_lse = (i_sequence * heads + o_h) * q_len + i_token % q_len
        gl.store(lse + o_lse, b_log, mask=m_h)


@gluon.jit
def _write(p_out, b_out, heads, layout: gl.constexpr):
    """Write half the values of up to 64 heads."""
    o_row = gl.arange(0, _HEADS, gl.SliceLayout(1, layout))
    o_col = gl.arange(0, _HALF, gl.SliceLayout(0, layout))
    p_rows = p_out + o_row[:, None] * (2 * _HALF) + o_col[None, :]
    gl.store(p_rows, b_out, mask=(o_row < heads)[:, None])


@gluon.jit
def _weigh(
    out, tiles, sizing, v_s, weights, last, k_empty,
    SIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply weights with channels ``[256 SIDE, 256 SIDE + 256)`` of the values; write out."""
    total, tokens, heads, head_tiles, _ = tiles
    p_s, fades, p_full = weights
    _, last_full, last_empty = last
    step = 0
    for turn in range(_count(total)):
        blocks = hear(turn, sizing)
        b_o = gl.zeros([_HEADS, _HALF], gl.float32, _VALUES)
        for _i in range(blocks):
            slot = step % STAGES
            mbarrier.wait(p_full.index(slot), (step // STAGES) & 1)
            fence_async_shared()
            b_o = b_o * _factors(fades.index(slot))
            b_o = warpgroup_mma(p_s.index(slot), v_s.index(slot), b_o, is_async=True)
            b_o = warpgroup_mma_wait(0, deps=(b_o,))
            barrier()
            mbarrier.arrive(k_empty.index(slot), count=1)
            step += 1
        mbarrier.wait(last_full, turn & 1)
        b_o = b_o * _factors(fades.index(STAGES))
        barrier()
        mbarrier.arrive(last_empty, count=1)
        i_t, i_token, i_part = _locate(turn, tokens, head_tiles)
        i_first = (i_part.to(gl.int64) * tokens + i_token) * heads + i_t * _HEADS
        p_out = out + i_first * (2 * _HALF) + SIDE * _HALF
        left = heads - i_t * _HEADS
        if out.dtype.element_ty == gl.float32:
            _write(p_out, b_o, left, _VALUES)
        else:
            b_half = gl.convert_layout(b_o.to(out.dtype.element_ty), _WRITTEN)
            _write(p_out, b_half, left, _WRITTEN)


@gluon.jit(do_not_specialize=_LENGTHS)
def latent_hopper_kernel(
    q, k, indices, sinks, out, lse,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_ib, s_in,
    total, tokens, q_len, k_len, heads, head_tiles, slots, span, scale_log2,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, LOOK: gl.constexpr,
    HAS_SINKS: gl.constexpr, VALUE_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attend: q ``[B, Sq, Hq, 576]``, k ``[B, Sk, 1, 576]``, int32 indices ``[B, Sq, 1, K]``.

    Writes out ``[parts, B, Sq, Hq, 512]`` and fp32 lse ``[parts, B, Hq, Sq]``; each part has
    ``span`` of the K ``slots``, in whole blocks. The scale is positive. Grid: any number of
    programs up to ``total`` tiles, ``parts * B * Sq * head_tiles``; ``tokens`` are ``B * Sq``.

    Bars of a stage: full when the copies of all gathering threads have landed (left: of the first
    256 channels), weights full when they stand where the last channels were, empty when both
    halves of the values have been read.
    """
    dtype: gl.constexpr = k.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    ql_s = gl.allocate_shared_memory(dtype, [_HEADS, _HALF], layout)
    qr_s = gl.allocate_shared_memory(dtype, [_HEADS, _HALF], layout)
    qt_s = gl.allocate_shared_memory(dtype, [_HEADS, _REST], layout)
    kl_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, _HALF], layout)
    kr_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, _HALF], layout)
    kt_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, _REST], layout)
    p_s = kt_s
    fades = gl.allocate_shared_memory(
        gl.float32, [STAGES + 1, _HEADS, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    sizes = gl.allocate_shared_memory(gl.int32, [2, _PLACES], flat)
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    last_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    last_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    size_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    size_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    left_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    p_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(q_full, count=_GATHER_THREADS)
    mbarrier.init(q_empty, count=1)
    mbarrier.init(last_full, count=1)
    mbarrier.init(last_empty, count=2)
    for i in gl.static_range(2):
        mbarrier.init(size_full.index(i), count=1)
        mbarrier.init(size_empty.index(i), count=3)
    for i in gl.static_range(STAGES):
        mbarrier.init(left_full.index(i), count=_GATHER_THREADS)
        mbarrier.init(k_full.index(i), count=_GATHER_THREADS)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(p_full.index(i), count=1)

    tensors = (q, s_qb, s_qn, s_qh, k, s_kb, s_kn)
    lists = (indices, s_ib, s_in, q_len, k_len, slots, span)
    tiles = (total, tokens, heads, head_tiles, q_len)
    sizing = (sizes, size_full, size_empty)
    q_s = (ql_s, qr_s, qt_s, q_full, q_empty)
    k_s = (kl_s, kr_s, kt_s, left_full, k_full)
    weights = (p_s, fades, p_full)
    last = (fades, last_full, last_empty)
    gl.warp_specialize(
        [
            (_score, ((lse, sinks), scale_log2, lists, tiles, sizing, q_s, k_s, weights, last,
                      BLOCK, STAGES, HAS_SINKS)),
            (_weigh, (out, tiles, sizing, kl_s, weights, last, k_empty, 0, STAGES)),
            (_weigh, (out, tiles, sizing, kr_s, weights, last, k_empty, 1, STAGES)),
            (_gather, (tensors, lists, tiles, sizing, q_s, k_s, k_empty, BLOCK, STAGES, LOOK)),
        ],
        [4, 4, 4],
        [VALUE_REGISTERS, VALUE_REGISTERS, GATHER_REGISTERS],
    )  # fmt: skip
