"""Two partitions of a kernel that hand a buffer over, rightly or without waiting for its reader.

python planted_race.py right | planted
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

_ONE_EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _give(p_out, buffer, full, empty, rounds, WAIT: gl.constexpr):
    o_t = gl.arange(0, 128, _ONE_EACH)
    for i in range(rounds):
        if WAIT:
            mbarrier.wait(empty.index(0), (i & 1) ^ 1)
        buffer.index(0).store(o_t + i)
        mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def _take(p_out, buffer, full, empty, rounds, WAIT: gl.constexpr):
    o_t = gl.arange(0, 128, _ONE_EACH)
    for i in range(rounds):
        mbarrier.wait(full.index(0), i & 1)
        gl.store(p_out + i * 128 + o_t, buffer.index(0).load(_ONE_EACH))
        if WAIT:
            mbarrier.arrive(empty.index(0), count=1)


@gluon.jit
def hand_over_kernel(p_out, rounds, WAIT: gl.constexpr):
    """Write ``thread + round`` to ``[rounds, 128]``."""
    buffer = gl.allocate_shared_memory(gl.int32, [1, 128], _PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(empty.index(0), count=1)
    arguments = (p_out, buffer, full, empty, rounds, WAIT)
    gl.warp_specialize([(_take, arguments), (_give, arguments)], [4], [240])


if __name__ == "__main__":
    numbers = torch.zeros(2, 128, dtype=torch.int32, device="cuda")
    hand_over_kernel[(1,)](numbers, 2, sys.argv[1] == "right", num_warps=4)
    torch.cuda.synchronize()
