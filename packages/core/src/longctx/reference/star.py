"""Oracle of Star Attention's two phases (Acharya et al., arXiv 2411.17116, algorithms 1 and 2).

Phase 1, the context: query ``i`` sees key ``j`` when ``j <= i and (i // b == j // b or j < a)``,
with absolute positions, block size ``b`` and anchor size ``a``. Phase 2, the query: softmax over
the keys of all shards, causal on the shard that owns the queries alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.reference.flash import flash_mask, masked_attention

__all__ = ["star_context_attention", "star_context_mask", "star_query_attention"]


def star_context_mask(q_len: int, k_len: int, *, block_size: int, anchor_size: int) -> Tensor:
    """Return the kept pairs of phase 1, bool ``[q_len, k_len]``; queries end where keys do."""
    i = torch.arange(k_len - q_len, k_len).unsqueeze(1)
    j = torch.arange(k_len).unsqueeze(0)
    return (j <= i) & ((i // block_size == j // block_size) | (j < anchor_size))


def star_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    anchor_size: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of phase 1, in the inputs' precision."""
    mask = star_context_mask(
        q.shape[1], k.shape[1], block_size=block_size, anchor_size=anchor_size
    )
    return masked_attention(q, k, v, mask.to(q.device), scale=scale)


def star_query_attention(
    q: Tensor,
    shards: Sequence[tuple[Tensor, Tensor]],
    *,
    query_shard: int = -1,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of phase 2, in the inputs' precision."""
    owner = range(len(shards))[query_shard]
    masks = [
        flash_mask(q.shape[1], k.shape[1], causal=n == owner, device=q.device)
        for n, (k, _) in enumerate(shards)
    ]
    k, v = (torch.cat(part, 1) for part in zip(*shards, strict=True))
    return masked_attention(q, k, v, torch.cat(masks, 1), scale=scale)
