"""Attention results in which every row attends nothing."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from longctx_triton.kernels.clear_rows import clear_rows_kernel
from longctx_triton.launch.prepared import Prepared

__all__ = ["cleared"]

_BLOCK = 4096


def cleared(q: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Return ``(out [B, Sq, Hq, value_dim], lse [B, Hq, Sq])`` of 0 and -inf, by one launch."""
    batch, q_len, heads, _ = q.shape
    out = torch.empty(batch, q_len, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if batch * q_len * heads * value_dim:
        _plan((batch, q_len, heads), value_dim)(clear_rows_kernel, out, lse)
    return out, lse


@lru_cache(maxsize=512)
def _plan(rows_shape: tuple[int, int, int], value_dim: int) -> Prepared:
    rows = math.prod(rows_shape)
    numbers = rows * value_dim
    options = {"BLOCK": _BLOCK, "num_warps": 8}
    return Prepared((-(-numbers // _BLOCK),), (numbers, rows), options)
