"""A block plan: key blocks a query block."""

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

__all__ = ["BlockPlan"]


@dataclass(frozen=True)
class BlockPlan:
    """Key blocks a query block, in the layout of FlexAttention's BlockMask.

    Attributes
    ----------
    counts : Tensor, (batch, heads, q_blocks), int32
        Kept key blocks of each query block (``kv_num_blocks``).
    indices : Tensor, (batch, heads, q_blocks, capacity), int32
        Their numbers (``kv_indices``); entries past the count are ignored.
    block_q, block_k : int
        Tokens a block. Query blocks tile this call's queries, key blocks the absolute keys.
    head_axis : {"shared", "kv", "query"}
    """

    counts: Tensor
    indices: Tensor
    block_q: int
    block_k: int
    head_axis: HeadAxis

    def __post_init__(self) -> None:
        check_int32("BlockPlan", counts=self.counts, indices=self.indices)
        check_rank("BlockPlan", "counts", self.counts, "batch, heads, q_blocks")
        check_rank("BlockPlan", "indices", self.indices, "batch, heads, q_blocks, capacity")
        check_counts("BlockPlan", "indices", self.indices, self.counts)
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"block sizes must be positive, got {self.block_q} x {self.block_k}")

    def to_mask(
        self, q_len: int, k_len: int, *, device: torch.device | None = None, causal: bool = True
    ) -> Tensor:
        """Return the kept pairs, ``[B, Hx, q_len, k_len]``; whole blocks unless ``causal``."""
        k_blocks = -(-k_len // self.block_k)
        kept = scatter_set(self.indices, valid_entries(self.indices, self.counts), k_blocks)
        kept = kept.repeat_interleave(self.block_q, 2)[:, :, :q_len]
        kept = kept.repeat_interleave(self.block_k, 3)[..., :k_len]
        kept = kept.to(device) if device is not None else kept
        if not causal:
            return kept
        rows, columns = positions(q_len, k_len, kept.device)
        return kept & (columns <= rows)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        first = k_len - q_len
        blocks = torch.arange(self.counts.shape[2], device=self.indices.device)
        q0 = (first + blocks * self.block_q).unsqueeze(1).double()
        q1 = (first + ((blocks + 1) * self.block_q).clamp(max=q_len)).unsqueeze(1).double()
        k0 = self.indices.double() * self.block_k
        k1 = (k0 + self.block_k).clamp(max=k_len)

        def triangle(n: Tensor) -> Tensor:
            n = n.clamp(min=0)
            return n * (n + 1) / 2

        # sum over rows r in [q0, q1) of clamp(r - k0 + 1, 0, k1 - k0), in closed form
        pairs = triangle(q1 - k0) - triangle(q0 - k0) - triangle(q1 - k1) + triangle(q0 - k1)
        kept = torch.where(valid_entries(self.indices, self.counts), pairs, 0.0).sum((2, 3))
        return share(float(kept.mean()), q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch, head count or length."""
        check_batch("BlockPlan", self.counts.shape[0], batch)
        check_heads("BlockPlan", self.head_axis, self.counts.shape[1], q_heads, kv_heads)
        wanted = -(-q_len // self.block_q)
        if self.counts.shape[2] != wanted:
            raise ValueError(
                f"BlockPlan has {self.counts.shape[2]} query blocks, {q_len} queries in blocks of "
                f"{self.block_q} need {wanted}: build the plan for this length"
            )
