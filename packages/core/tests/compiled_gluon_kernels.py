"""A Gluon kernel for Hopper: descriptor loads into shared memory and an asynchronous wgmma."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# the first name is that of Triton 3.6, the second that of 3.8 and later
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def product_kernel(a, b, out, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr):
    accumulator: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16]
    )
    s_a = gl.allocate_shared_memory(a.dtype, [M, K], a.layout)
    s_b = gl.allocate_shared_memory(b.dtype, [K, N], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, a.block_type.nbytes + b.block_type.nbytes)
    load(a, [0, 0], full, s_a)
    load(b, [0, 0], full, s_b)
    mbarrier.wait(full, 0)
    # [M, N]
    b_c = warpgroup_mma(s_a, s_b, gl.zeros([M, N], gl.float32, accumulator), is_async=True)
    b_c = warpgroup_mma_wait(0, deps=(b_c,))
    o_m = gl.arange(0, M, gl.SliceLayout(1, accumulator))
    o_n = gl.arange(0, N, gl.SliceLayout(0, accumulator))
    gl.store(out + o_m[:, None] * N + o_n[None, :], b_c)
