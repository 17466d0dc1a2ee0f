"""What the Hopper backward adds to dq: products with keys, and their sum in memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

__all__ = ["ROWS", "add_to_memory", "times_keys"]

ROWS = 64
"""Queries of one block."""

_ROWS = gl.constexpr(ROWS)


@gluon.jit
def times_keys(ds_s, left, k_parts):
    """Start the product of a block's gradient of scores with channels of the keys."""
    k0, k1 = k_parts
    width: gl.constexpr = k0.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16]
    )
    b_zero = gl.zeros([_ROWS, width], gl.float32, layout)
    ds0 = ds_s.index(2 * left).permute((1, 0))
    ds1 = ds_s.index(2 * left + 1).permute((1, 0))
    b_dq = warpgroup_mma(ds0, k0, b_zero, use_acc=False, is_async=True)
    return warpgroup_mma(ds1, k1, b_dq, is_async=True)


@gluon.constexpr_function
def _add_assembly():
    values = ", ".join(f"${8 + i}" for i in range(4))
    unused = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    return f"red.relaxed.gpu.global.add.v4.f32 [$4], {{{values}}}; {unused}"


@gluon.jit
def add_to_memory(p_sum, b_x):
    """Add ``b_x [64, columns]``, a warpgroup's accumulator, to memory.

    The sums lie as the threads hold them, four of each thread together: a permutation of the
    block, ``[columns / 8, 4, 8, 4, 2, 2]`` of (column bits 3.., row bits 4 and 5, row bits 0 to
    2, column bits 1 and 2, row bit 3, column bit 0).
    """
    columns: gl.constexpr = b_x.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    b_x = b_x.reshape([4, 2, 8, columns // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    b_x = gl.convert_layout(b_x.reshape([_ROWS * columns]), flat, assert_trivial=True)
    p_x = p_sum + gl.arange(0, _ROWS * columns, flat)
    gl.inline_asm_elementwise(
        _add_assembly(), "=r,=r,=r,=r,l,l,l,l,f,f,f,f", [p_x.to(gl.int64), b_x],
        dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip
