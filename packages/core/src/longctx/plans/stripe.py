"""A stripe plan: vertical key columns and slash diagonals."""

from __future__ import annotations

from dataclasses import dataclass

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

__all__ = ["StripePlan"]


@dataclass(frozen=True)
class StripePlan:
    """Vertical key columns and slash diagonals (MInference, FlexPrefill).

    Attributes
    ----------
    vertical : Tensor, (batch, heads, capacity), int32
        Key positions that every later query sees; unique.
    vertical_counts : Tensor, (batch, heads), int32
    slash : Tensor, (batch, heads, capacity), int32
        Distances ``query - key`` that are kept; unique; 0 is the diagonal itself.
    slash_counts : Tensor, (batch, heads), int32
    head_axis : {"shared", "kv", "query"}
    """

    vertical: Tensor
    vertical_counts: Tensor
    slash: Tensor
    slash_counts: Tensor
    head_axis: HeadAxis

    def __post_init__(self) -> None:
        check_int32(
            "StripePlan",
            vertical=self.vertical,
            vertical_counts=self.vertical_counts,
            slash=self.slash,
            slash_counts=self.slash_counts,
        )
        for name in ("vertical", "slash"):
            check_rank("StripePlan", name, getattr(self, name), "batch, heads, capacity")
            check_rank(
                "StripePlan", f"{name}_counts", getattr(self, f"{name}_counts"), "batch, heads"
            )
            check_counts("StripePlan", name, getattr(self, name), getattr(self, f"{name}_counts"))

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[B, Hx, q_len, k_len]``."""
        columns_kept = scatter_set(
            self.vertical, valid_entries(self.vertical, self.vertical_counts), k_len
        )
        diagonals = scatter_set(self.slash, valid_entries(self.slash, self.slash_counts), k_len)
        if device is not None:
            columns_kept, diagonals = columns_kept.to(device), diagonals.to(device)
        rows, columns = positions(q_len, k_len, columns_kept.device)
        distance = rows - columns
        on_slash = diagonals[..., distance.clamp(min=0)]
        return (columns_kept.unsqueeze(2) | on_slash) & (distance >= 0)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        first = k_len - q_len
        kept = 0.0
        for stripes, counts in (
            (self.vertical, self.vertical_counts),
            (self.slash, self.slash_counts),
        ):
            seen_by = (k_len - stripes.clamp(min=first)).clamp(min=0).double()
            kept += float(torch.where(valid_entries(stripes, counts), seen_by, 0.0).sum())
        # a column and a diagonal cross at query v + o: that pair was counted twice
        crossing = self.vertical.unsqueeze(-1) + self.slash.unsqueeze(-2)
        both = valid_entries(self.vertical, self.vertical_counts).unsqueeze(-1) & valid_entries(
            self.slash, self.slash_counts
        ).unsqueeze(-2)
        kept -= float((both & (crossing >= first) & (crossing < k_len)).sum())
        sets = self.vertical.shape[0] * self.vertical.shape[1]
        return share(kept / max(sets, 1), q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch or head count."""
        for tensor in (self.vertical, self.slash):
            check_batch("StripePlan", tensor.shape[0], batch)
            check_heads("StripePlan", self.head_axis, tensor.shape[1], q_heads, kv_heads)
