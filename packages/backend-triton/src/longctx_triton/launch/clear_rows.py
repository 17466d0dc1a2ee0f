"""Attention results in which every row attends nothing, before a kernel that fills some rows."""

from __future__ import annotations

import math

import torch

from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.scratch import Pieces

__all__ = ["COUNTER", "clearing"]

COUNTER: Pieces = ((1, torch.int32),)
"""Memory of the number that is set to 0 as well."""
_BLOCK = 4096


def clearing(out_shape: tuple[int, ...]) -> Prepared:
    """Return the launch of ``clear_rows_kernel``.

    It takes results ``[B, Sq, Hq, Dv]``, which are not empty, their log-sum-exps ``[B, Hq, Sq]``
    and a counter.
    """
    numbers = math.prod(out_shape)
    options = {"BLOCK": _BLOCK, "num_warps": 8}
    return Prepared((-(-numbers // _BLOCK),), (numbers, math.prod(out_shape[:3])), options)
