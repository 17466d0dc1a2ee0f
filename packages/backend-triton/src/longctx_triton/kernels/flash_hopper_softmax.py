"""The softmax of the Hopper kernels, written for the instructions that it costs.

A warpgroup's accumulator holds 64 rows; four threads share a row, and a thread holds two columns
of every eight.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["ROWS", "ROW_THREADS", "block_softmax", "denominator", "faded", "hide"]

_LOG2E = gl.constexpr(1.4426950408889634)
ROWS = 64
"""Query rows of one warpgroup, which is what its matrix instruction multiplies."""

ROW_THREADS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [ROWS, 4]
    )
)
"""Layout of rows by the four threads that share each."""


@gluon.jit
def block_softmax(
    b_s, b_m, b_l, scale2, first, limits,
    MASKED: gl.constexpr, POLY: gl.constexpr,
):  # fmt: skip
    """Return ``(P, running maximum, running sum, fading factor)`` in base 2.

    ``limits`` (or None) are the last keys that the rows see.
    """
    if MASKED and limits is not None:
        b_s = hide(b_s, limits - first, True)
    b_top = gl.maximum(b_m, gl.max(b_s, 1) * scale2)
    b_shift = b_top
    if MASKED:
        # a row that has seen nothing yet: -inf less -inf would be NaN
        b_shift = gl.where(b_top == float("-inf"), 0.0, b_top)
    b_p = _exp2(b_s * scale2 - b_shift[:, None], POLY)
    b_fade = gl.exp2(b_m - b_shift)
    fade_l = gl.convert_layout(b_fade, gl.SliceLayout(1, ROW_THREADS), assert_trivial=True)
    b_l = b_l * fade_l[:, None] + _sum_in_threads(b_p, ROW_THREADS)
    return b_p, b_top, b_l, b_fade


@gluon.constexpr_function
def _exp2_assembly(share):
    lines = [f"ex2.approx.ftz.f32 ${i}, ${i + share};" for i in range(share - 1)]
    x = f"${2 * share - 1}"
    y = f"${share - 1}"
    lines += [
        "{ .reg .f32 x, t, f, p; .reg .b32 e;",
        f"max.ftz.f32 x, {x}, 0fC2FE0000;",  # -127
        "add.rn.ftz.f32 t, x, 0f4B400000;",  # 1.5 * 2**23: the integer is in the low bits
        "add.rn.ftz.f32 f, t, 0fCB400000;",
        "sub.rn.ftz.f32 f, x, f;",
        "fma.rn.ftz.f32 p, f, 0f3D61505E, 0f3E780609;",
        "fma.rn.ftz.f32 p, p, f, 0f3F317AFE;",
        "fma.rn.ftz.f32 p, p, f, 0f3F800000;",
        "mov.b32 e, t; shl.b32 e, e, 23;",
        "{ .reg .b32 b; mov.b32 b, p; add.s32 b, b, e; mov.b32 " + y + ", b; } }",
    ]
    return "\n".join(lines)


@gluon.constexpr_function
def _exp2_constraints(share):
    return ",".join(["=&f"] * share + ["f"] * share)


@gluon.jit
def _exp2(b_x, POLY: gl.constexpr):
    """Return powers of 2, one of POLY neighbours by a polynomial.

    The polynomial runs on the units that multiply and add, which have slots to spare where the
    one for exponentials has none (Cody and Waite; FlashAttention-4). Degree 3 on [-1/2, 1/2] is
    right to 1e-4, a twentieth of what rounding to bf16 takes.
    """
    if POLY == 0:
        b_p = gl.exp2(b_x)
    else:
        b_p = gl.inline_asm_elementwise(
            _exp2_assembly(POLY), _exp2_constraints(POLY), [b_x], dtype=gl.float32, is_pure=True,
            pack=POLY,
        )  # fmt: skip
    return b_p


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
def faded(b_o, b_fade, LAZY: gl.constexpr):
    """Return ``b_o`` times ``b_fade [rows]``.

    LAZY branches around the products, a warp at a time, where every factor is 1: the maxima
    soon stop rising.
    """
    b_f = gl.convert_layout(b_fade, gl.SliceLayout(1, b_o.type.layout))[:, None]
    held: gl.constexpr = b_o.shape[1] // 2
    if LAZY:
        b_o = gl.inline_asm_elementwise(
            _fade_assembly(held), _fade_constraints(held), [b_o, b_f], dtype=gl.float32,
            is_pure=True, pack=held,
        )  # fmt: skip
    else:
        b_o = b_o * b_f
    return b_o


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
