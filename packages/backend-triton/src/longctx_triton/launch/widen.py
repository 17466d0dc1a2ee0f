"""fp8 tensors in fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx_triton.kernels.widen import widen_kernel
from longctx_triton.launch.prepared import launch

__all__ = ["widened"]

_ROWS = 64


def widened(t: Tensor) -> Tensor:
    """Return ``t [B, S, H, D]``, in e4m3, contiguous in fp16; D is a power of two."""
    out = torch.empty(t.shape, dtype=torch.float16, device=t.device)
    batch, seq, heads, head_dim = t.shape
    rows = batch * seq * heads
    strides = (stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))
    stride_b, stride_s, stride_h, _ = strides
    launch(
        widen_kernel, (-(-rows // _ROWS),),
        t, out, rows, seq, heads, stride_b, stride_s, stride_h,
        HEAD_DIM=head_dim, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out
