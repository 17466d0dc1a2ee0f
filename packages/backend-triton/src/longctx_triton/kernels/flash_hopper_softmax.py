"""The softmax of the Hopper kernels, written for the instructions that it costs.

A warpgroup's accumulator holds 64 rows; four threads share a row, and a thread holds two columns
of every eight.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "NOTHING_SEEN", "ROWS", "ROW_THREADS", "SLACK", "block_softmax", "denominator", "faded",
    "hide",
]  # fmt: skip

_LOG2E = gl.constexpr(1.4426950408889634)
ROWS = 64
"""Query rows of one warpgroup, which is what its matrix instruction multiplies."""
SLACK = 8.0
"""Powers of two that a row's maximum may rise before its sums are rescaled."""
_SLACK = gl.constexpr(SLACK)
NOTHING_SEEN = gl.constexpr(-3.0e38)
"""Reference of rows that have seen no key: finite, where -inf less -inf would be NaN."""

ROW_THREADS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [ROWS, 4]
    )
)
"""Layout of rows by the four threads that share each."""


@gluon.jit
def block_softmax(b_s, b_m, b_l, scale2, first, limits):
    """Return ``(P, row reference, running sum, fading factor)`` in base 2.

    ``limits`` (or None) are the last keys that the rows see. The reference, which P is taken
    from, is the running maximum or up to `SLACK` less: weights above 1 are as precise as others,
    and a block that raises the maximum by little leaves older sums as they are
    (FlashAttention-4's conditional rescaling). It is `NOTHING_SEEN` before a row's first key.
    """
    if limits is not None:
        b_s = hide(b_s, limits - first, True)
    # A thread holds two rows. One after the other: the second one's maximum is found while the
    # first one's exponentials are under way, where the assembler at times finds both before any.
    s_0, s_1 = _halves(b_s)
    m_0, m_1 = _halves(b_m)
    p_0, m_0, fade_0, l_0 = _half_softmax(s_0, m_0, scale2)
    p_1, m_1, fade_1, l_1 = _half_softmax(s_1, m_1, scale2)
    b_p = _whole(p_0, p_1, b_s)
    b_top = _whole(m_0, m_1, b_m)
    b_fade = _whole(fade_0, fade_1, b_m)
    fade_l = gl.convert_layout(b_fade, gl.SliceLayout(1, ROW_THREADS), assert_trivial=True)
    b_l = b_l * fade_l[:, None] + _whole(l_0, l_1, b_l)
    return b_p, b_top, b_l, b_fade


@gluon.jit
def _halves(x):
    """Return the first and the last eight of every sixteen rows, ``[rows / 16, 8, ...]`` each."""
    rows: gl.constexpr = x.shape[0]
    if len(x.shape) == 1:
        return gl.split(x.reshape([rows // 16, 2, 8]).permute((0, 2, 1)))
    else:
        return gl.split(x.reshape([rows // 16, 2, 8, x.shape[1]]).permute((0, 2, 3, 1)))


@gluon.jit
def _whole(x_0, x_1, like):
    """Put two `_halves` together, in the layout of ``like``."""
    x = gl.join(x_0, x_1)
    rows: gl.constexpr = 16 * x.shape[0]
    if len(x.shape) == 3:
        x = x.permute((0, 2, 1)).reshape([rows])
    else:
        x = x.permute((0, 3, 1, 2)).reshape([rows, x.shape[2]])
    return _like(x, like)


@gluon.jit
def _half_softmax(x, b_m, scale2):
    """Return what `block_softmax` does for half of the rows, and what is added to the sums.

    A thread holds two columns of every eight: the greatest of each two first, since as one chain
    every comparison would wait for the one before it.
    """
    parts: gl.constexpr = [x.shape[0], x.shape[1], x.shape[2] // 8, 4, 2]
    b_top = _like(gl.max(gl.max(gl.max(x.reshape(parts), 4), 2), 2), b_m) * scale2
    b_top = gl.where(b_top > b_m + _SLACK, b_top, b_m)
    b_p = gl.exp2(x * scale2 - _beside(b_top, x))
    # before the factor: the assembler keeps to this order, and windows take 0.7 % less time
    b_l = gl.sum(gl.sum(b_p.reshape(parts), 4), 2)
    return b_p, b_top, gl.exp2(b_m - b_top), b_l


@gluon.jit
def _like(x, other):
    """Return ``x`` in the layout of ``other``, which moves nothing."""
    layout: gl.constexpr = other.type.layout
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _beside(b_x, x):
    """Return ``b_x``, a number a row, so that it can be combined with the columns of ``x``."""
    layout: gl.constexpr = gl.SliceLayout(2, x.type.layout)
    return gl.convert_layout(b_x, layout, assert_trivial=True)[:, :, None]


@gluon.jit
def denominator(b_m, b_l, sinks, i_h, rows: gl.constexpr, HAS_SINKS: gl.constexpr):
    """Return ``(maximum, sum, fading factor)`` of rows, sinks included; the factor is 1 without.

    ``b_l`` is what a row's threads hold of its sum.
    """
    b_l = gl.convert_layout(gl.sum(b_l, 1), rows, assert_trivial=True)
    b_fade = 1.0
    if HAS_SINKS:
        sink = gl.load(sinks + i_h) * _LOG2E
        b_top = gl.maximum(b_m, sink)
        b_fade = gl.exp2(b_m - b_top)
        b_l = b_l * b_fade + gl.exp2(sink - b_top)
        b_m = b_top
    return b_m, b_l, b_fade


@gluon.constexpr_function
def _fade_assembly(count):
    first, second = f"${2 * count}", f"${2 * count + 2}"
    return (
        "{ .reg .pred any; .reg .f32 t;\n"
        f"min.f32 t, {first}, {second};\n"
        "setp.lt.f32 any, t, 0f3F800000;\n"
        "vote.sync.any.pred any, any, 0xffffffff;\n"
        "@!any bra SKIP;\n"
        + "\n".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
        + "\nSKIP: }"
    )


@gluon.constexpr_function
def _fade_constraints(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def faded(b_o, b_fade):
    """Return ``b_o`` times ``b_fade [rows]``.

    A warp branches around the products where every factor is 1, as in most blocks.
    """
    b_f = gl.convert_layout(b_fade, gl.SliceLayout(1, b_o.type.layout))[:, None]
    held: gl.constexpr = b_o.shape[1] // 2
    return gl.inline_asm_elementwise(
        _fade_assembly(held), _fade_constraints(held), [b_o, b_f], dtype=gl.float32,
        is_pure=True, pack=held,
    )  # fmt: skip


@gluon.jit
def hide(b_s, bounds, AFTER: gl.constexpr):
    """Set the scores of columns after, or else before, ``bounds [rows]`` to -inf.

    The columns that a thread holds are compared as constants, less the part that depends on the
    thread: as sums they would take a register each.
    """
    rows: gl.constexpr = b_s.shape[0]
    columns: gl.constexpr = b_s.shape[1]
    b_x = b_s.reshape([rows, columns // 8, 4, 2])
    layout: gl.constexpr = b_x.type.layout
    pairs: gl.constexpr = gl.SliceLayout(3, layout)
    eights: gl.constexpr = gl.SliceLayout(2, pairs)
    bounds = gl.convert_layout(bounds, gl.SliceLayout(1, eights), assert_trivial=True)
    o_t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, pairs)))
    bounds = bounds[:, None, None, None] - 2 * o_t[None, None, :, None]
    o_a = gl.arange(0, columns // 8, gl.SliceLayout(0, eights))[None, :, None, None]
    o_e = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    o_k = 8 * o_a + o_e[None, None, None, :]
    keep = o_k <= bounds if AFTER else o_k >= bounds
    b_x = gl.where(keep, b_x, float("-inf"))
    return gl.convert_layout(b_x.reshape([rows, columns]), b_s.type.layout, assert_trivial=True)
