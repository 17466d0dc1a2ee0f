"""Exact and fast widening of fp8 e4m3 tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["widen"]


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp8 e4m3 ``x`` in a wider dtype; every value, NaN included, is kept exactly.

    On a CPU PyTorch converts one element at a time. Moving exponent and mantissa into their
    places of an fp16 (whose exponent bias is larger by 8) vectorises; 2**8 restores the value.
    """
    if x.device.type != "cpu":
        return x.to(dtype)
    codes = x.view(torch.int8)
    bits = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    wide = bits.view(torch.float16).to(dtype).mul_(256.0)
    # by its place NaN became the number after the largest, 448; a look at all bytes is cheap
    if codes.numel() and (codes | -0x80).amax() == -1:
        wide.masked_fill_(wide.abs() == 480.0, torch.nan)
    return wide
