"""Star Attention's blockwise context as a plan (arXiv 2411.17116)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.plans import causal_pairs
from longctx.protocols.selector import SelectContext
from longctx_models.selectors.window import key_length

__all__ = ["StarPlan", "StarSelector"]


@dataclass(frozen=True)
class StarPlan:
    """Each block of the context sees itself and the anchor.

    Keeps key ``j`` of query position ``i`` when ``j <= i`` and (``i // block_size == j //
    block_size`` or ``j < anchor_size``).

    Attributes
    ----------
    block_size, anchor_size : int
        ``anchor_size`` is at most ``block_size``.
    """

    block_size: int
    anchor_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1 or not 0 <= self.anchor_size <= self.block_size:
            raise ValueError(
                "star attention needs block_size of at least 1 and anchor_size from 0 to "
                "block_size, "
                f"got {self.block_size} and {self.anchor_size}"
            )

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[1, 1, q_len, k_len]``."""
        rows = torch.arange(k_len - q_len, k_len, device=device).unsqueeze(1)
        columns = torch.arange(k_len, device=device).unsqueeze(0)
        same = rows // self.block_size == columns // self.block_size
        keep = (same | (columns < self.anchor_size)) & (columns <= rows)
        return keep.reshape(1, 1, q_len, k_len)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        rows = torch.arange(k_len - q_len, k_len, dtype=torch.int64)
        anchor = torch.where(rows >= self.block_size, self.anchor_size, 0)
        return int((rows % self.block_size + 1 + anchor).sum()) / causal_pairs(q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Accept any shape: the plan depends on positions alone."""


@dataclass(frozen=True)
class StarSelector:
    """Encodes the context in blocks.

    Attributes
    ----------
    plan : StarPlan
    """

    plan: StarPlan

    def select(self, context: SelectContext) -> StarPlan | None:
        """Return the plan, or None while there is one block."""
        return self.plan if key_length(context.k) > self.plan.block_size else None
