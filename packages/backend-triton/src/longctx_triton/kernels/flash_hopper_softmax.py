"""The softmax of the Hopper kernels, written for the instructions that it costs.

A warpgroup's accumulator holds 64 rows; four threads share a row, and a thread holds two columns
of every eight.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["ROWS", "ROW_THREADS", "SLACK", "block_softmax", "denominator", "faded", "hide"]

_LOG2E = gl.constexpr(1.4426950408889634)
ROWS = 64
"""Query rows of one warpgroup, which is what its matrix instruction multiplies."""
SLACK = 8.0
"""Powers of two that a row's maximum may rise before its sums are rescaled."""
_SLACK = gl.constexpr(SLACK)

ROW_THREADS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [ROWS, 4]
    )
)
"""Layout of rows by the four threads that share each."""


@gluon.jit
def block_softmax(
    b_s, b_m, b_l, scale2, first, limits, MASKED: gl.constexpr
):  # fmt: skip
    """Return ``(P, row reference, running sum, fading factor)`` in base 2.

    ``limits`` (or None) are the last keys that the rows see. The reference, which P is taken
    from, is the running maximum or up to `SLACK` less: weights above 1 are as precise as others,
    and a block that raises the maximum by little leaves older sums as they are
    (FlashAttention-4's conditional rescaling).
    """
    if MASKED and limits is not None:
        b_s = hide(b_s, limits - first, True)
    b_top = gl.max(b_s, 1) * scale2
    b_top = gl.where(b_top > b_m + _SLACK, b_top, b_m)
    b_shift = b_top
    if MASKED:
        # a row that has seen nothing yet: -inf less -inf would be NaN
        b_shift = gl.where(b_top == float("-inf"), 0.0, b_top)
    b_p = gl.exp2(b_s * scale2 - b_shift[:, None])
    b_fade = gl.exp2(b_m - b_shift)
    fade_l = gl.convert_layout(b_fade, gl.SliceLayout(1, ROW_THREADS), assert_trivial=True)
    b_l = b_l * fade_l[:, None] + _sum_in_threads(b_p, ROW_THREADS)
    return b_p, b_top, b_l, b_fade


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
        # without a key, and with a sink of -inf: -inf less -inf would be NaN
        b_shift = gl.where(b_top == float("-inf"), 0.0, b_top)
        b_fade = gl.exp2(b_m - b_shift)
        b_l = b_l * b_fade + gl.exp2(sink - b_shift)
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


@gluon.jit
def _sum_in_threads(b_p, layout: gl.constexpr):
    """Return ``[rows, 4]``, what each of a row's four threads holds of its sum."""
    rows: gl.constexpr = b_p.shape[0]
    columns: gl.constexpr = b_p.shape[1]
    # a thread holds two columns of every eight
    b_p = b_p.reshape([rows, columns // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(b_p, 3), 1), layout, assert_trivial=True)
