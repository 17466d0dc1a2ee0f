"""A token-set plan: one ascending set of tokens a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longctx.plans.base import (
    HeadAxis,
    check_batch,
    check_counts,
    check_heads,
    check_int32,
    check_rank,
    positions,
    scatter_set,
    share,
    valid_entries,
)

__all__ = ["TokenSetPlan"]


@dataclass(frozen=True)
class TokenSetPlan:
    """One ascending set of tokens a head (Token Sparse Attention, FastKV, GemFilter).

    Attributes
    ----------
    indices : Tensor, (batch, heads, capacity), int32
        Absolute token positions, ascending, then -1.
    counts : Tensor, (batch, heads), int32
    head_axis : {"shared", "kv", "query"}
    scope : {"qkv", "kv"}
        Whether the set restricts queries and keys, or keys alone.
    """

    indices: Tensor
    counts: Tensor
    head_axis: HeadAxis
    scope: Literal["qkv", "kv"] = "qkv"

    def __post_init__(self) -> None:
        indices, counts = self.indices, self.counts
        if (
            indices.dtype == counts.dtype == torch.int32
            and indices.ndim == 3
            and counts.shape == indices.shape[:-1]
        ):
            return
        # what does not fit is looked for one by one
        check_int32("TokenSetPlan", indices=self.indices, counts=self.counts)
        check_rank("TokenSetPlan", "indices", self.indices, "batch, heads, capacity")
        check_rank("TokenSetPlan", "counts", self.counts, "batch, heads")
        check_counts("TokenSetPlan", "indices", self.indices, self.counts)

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[B, Hx, q_len, k_len]``."""
        member = scatter_set(self.indices, valid_entries(self.indices, self.counts), k_len)
        member = member.to(device) if device is not None else member
        rows, columns = positions(q_len, k_len, member.device)
        keep = member.unsqueeze(2) & (columns <= rows)
        if self.scope == "qkv":
            queries = torch.nn.functional.pad(member, (max(q_len - k_len, 0), 0))
            keep = keep & queries[..., queries.shape[-1] - q_len :].unsqueeze(3)
        return keep

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        valid = valid_entries(self.indices, self.counts)
        first = k_len - q_len
        total = valid.sum(-1).double()
        if self.scope == "qkv":
            outside = (valid & (self.indices < first)).sum(-1).double()
            kept = total * (total + 1) / 2 - outside * (outside + 1) / 2
        else:
            seen_by = k_len - self.indices.clamp(min=first).double()
            kept = torch.where(valid, seen_by, 0.0).sum(-1)
        return share(float(kept.mean()), q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch, head count or length."""
        check_batch("TokenSetPlan", self.indices.shape[0], batch)
        check_heads("TokenSetPlan", self.head_axis, self.indices.shape[1], q_heads, kv_heads)
