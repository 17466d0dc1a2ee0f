"""A retention plan: the cache slots to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.plans.base import (
    check_batch,
    check_counts,
    check_heads,
    check_int32,
    check_rank,
    scatter_set,
    valid_entries,
)

__all__ = ["RetentionPlan"]


@dataclass(frozen=True)
class RetentionPlan:
    """The cache slots to keep, ragged by KV head (SnapKV, H2O, StreamingLLM's cache).

    Attributes
    ----------
    indices : Tensor, (batch, kv_heads, capacity), int32
        Physical slots to keep, ascending, then -1.
    counts : Tensor, (batch, kv_heads), int32
    """

    indices: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        check_int32("RetentionPlan", indices=self.indices, counts=self.counts)
        check_rank("RetentionPlan", "indices", self.indices, "batch, kv_heads, capacity")
        check_rank("RetentionPlan", "counts", self.counts, "batch, kv_heads")
        check_counts("RetentionPlan", "indices", self.indices, self.counts)

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return what later queries see, ``[B, Hkv, q_len, k_len]``: the same row for all."""
        member = scatter_set(self.indices, valid_entries(self.indices, self.counts), k_len)
        member = member.to(device) if device is not None else member
        return member.unsqueeze(2).expand(-1, -1, q_len, -1)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept slots / slots; ``q_len`` plays no part."""
        return float(valid_entries(self.indices, self.counts).sum(-1).double().mean()) / max(
            k_len, 1
        )

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch or head count."""
        check_batch("RetentionPlan", self.indices.shape[0], batch)
        check_heads("RetentionPlan", "kv", self.indices.shape[1], q_heads, kv_heads)
