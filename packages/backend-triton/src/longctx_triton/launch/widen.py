"""fp8 tensors in fp16."""

from __future__ import annotations

import math

import torch

from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.scratch import Pieces

__all__ = ["widening"]

_ROWS = 64


def widening(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Prepared, Pieces]:
    """Return the launch of ``widen_kernel`` and the memory of its result.

    It takes ``[B, S, H, D]`` in e4m3, D a power of two, and writes fp16, contiguous.
    """
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
