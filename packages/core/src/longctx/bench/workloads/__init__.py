"""Inputs, calls and exact results of every op, one file a family."""

from __future__ import annotations

from collections.abc import Mapping

from longctx.bench.workloads import (
    block_sparse,
    decode,
    dsa,
    flash,
    lightning,
    star,
    token_sparse,
)
from longctx.bench.workloads.workload import Inputs, Workload

__all__ = ["WORKLOADS", "Inputs", "Workload"]

WORKLOADS: Mapping[str, Workload] = {
    op: workload
    for family in (flash, decode, lightning, dsa, block_sparse, star, token_sparse)
    for op, workload in family.WORKLOADS.items()
}
"""Workloads by public op name."""
