"""A small case that tests of the bench run on a CPU."""

from __future__ import annotations

import torch

from longctx.bench.case import Case, axes

__all__ = ["CASE", "CPU"]

CPU = torch.device("cpu")
CASE = Case(
    "flash_attention",
    "test",
    axes(batch=1, seq=400, q_heads=4, kv_heads=2, head_dim=16),
    dtype="fp32",
)
