"""fp8 tensors in fp16."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from longctx_triton.kernels.widen import widen_kernel
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.scratch import Pieces, scratch

__all__ = ["widened"]

_ROWS = 64


def widened(t: Tensor) -> Tensor:
    """Return ``t [B, S, H, D]``, in e4m3, in fp16, without its axes; D is a power of two.

    The result is scratch memory, all of it that a call gets.
    """
    plan, memory = _plan(t.shape, t.stride())
    (out,) = scratch(t, memory)
    plan(widen_kernel, t, out)
    return out


@lru_cache(maxsize=512)
def _plan(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Prepared, Pieces]:
    batch, seq, heads, head_dim = shape
    rows = batch * seq * heads
    used = (stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    stride_b, stride_s, stride_h, _ = used
    plan = Prepared(
        (-(-rows // _ROWS),),
        (rows, seq, heads, stride_b, stride_s, stride_h),
        {"HEAD_DIM": head_dim, "ROWS": _ROWS, "num_warps": 4},
    )
    return plan, ((math.prod(shape), torch.float16),)
