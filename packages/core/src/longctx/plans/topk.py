"""A top-k plan: the best keys, or pages of keys, of each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.plans.base import (
    HeadAxis,
    check_batch,
    check_heads,
    check_int32,
    check_rank,
    positions,
    scatter_set,
    share,
)

__all__ = ["TopKPlan"]


@dataclass(frozen=True)
class TopKPlan:
    """The best keys (or pages of keys) of each query (DeepSeek Sparse Attention, Quest, NSA).

    Attributes
    ----------
    indices : Tensor, (batch, q_len, heads, k), int32
        Key positions, or page numbers when ``page_size`` > 1; -1 anywhere means none.
    head_axis : {"shared", "kv"}
    page_size : int
        Consecutive keys that one index names.
    """

    indices: Tensor
    head_axis: HeadAxis = "shared"
    page_size: int = 1

    def __post_init__(self) -> None:
        check_int32("TopKPlan", indices=self.indices)
        check_rank("TopKPlan", "indices", self.indices, "batch, q_len, heads, k")
        if self.page_size < 1:
            raise ValueError(f"TopKPlan.page_size must be at least 1, got {self.page_size}")

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[B, Hx, q_len, k_len]``."""
        units = -(-k_len // self.page_size)
        member = scatter_set(self.indices, self.indices >= 0, units)
        keep = member.transpose(1, 2).repeat_interleave(self.page_size, -1)[..., :k_len]
        keep = keep.to(device) if device is not None else keep
        if self.page_size == 1:
            return keep
        rows, columns = positions(q_len, k_len, keep.device)
        return keep & (columns <= rows)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs; indices are taken to be unique in a row."""
        valid = self.indices >= 0
        rows = torch.arange(k_len - q_len, k_len, device=valid.device).view(1, -1, 1, 1)
        start = self.indices.long() * self.page_size
        size = (rows + 1 - start).clamp(min=0, max=self.page_size) if self.page_size > 1 else 1
        kept = (valid * size).sum((1, 3)).double()
        return share(float(kept.mean()), q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch, head count or length."""
        check_batch("TopKPlan", self.indices.shape[0], batch)
        check_heads("TopKPlan", self.head_axis, self.indices.shape[2], q_heads, kv_heads)
        if self.indices.shape[1] != q_len:
            raise ValueError(
                f"TopKPlan has rows for {self.indices.shape[1]} queries, q has {q_len}"
            )
