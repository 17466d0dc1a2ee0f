"""Oracle of Token Sparse Attention: score tokens, choose a set a head, attend inside the set.

Jo et al., Token Sparse Attention, arXiv 2602.03216, algorithm 1, as the authors' code runs it: the
mean (not the sum) over the recent queries, pooling that counts its zero padding, and the recent
tokens always kept. Everything runs in the inputs' precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.plans import TokenSetPlan
from longctx.reference.flash import flash_mask, masked_attention

__all__ = ["select_tokens", "token_scores", "token_sparse_attention"]


def token_scores(
    q_recent: Tensor, k: Tensor, *, pool: int = 7, scale: float | None = None
) -> Tensor:
    """Return ``[B, Hq, Sk - W]``: what the last ``W`` queries attend to, averaged and pooled."""
    window, k_len = q_recent.shape[1], k.shape[1]
    k = k.repeat_interleave(q_recent.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q_recent, k)
    scores = scores * (q_recent.shape[-1] ** -0.5 if scale is None else scale)
    keep = flash_mask(window, k_len, causal=True, device=k.device)
    share = scores.masked_fill(~keep, -torch.inf).softmax(-1).mean(2)[..., : k_len - window]
    padded = torch.nn.functional.pad(share, (pool // 2, pool // 2))
    return torch.stack([padded[..., i : i + k_len - window] for i in range(pool)]).mean(0)


def select_tokens(
    scores: Tensor, *, drop_mass: float, min_tokens: int = 1024, recent: int = 128
) -> TokenSetPlan:
    """Return the plan of ``scores [B, H, L]``: one length a batch entry, one identity a head.

    ``n = count(cumsum(sort(g)) < drop_mass) + 1`` tokens hold the tail mass that may go (``g`` is
    the head-mean, normalised), ``max(min_tokens, L - n)`` stay; ``drop_mass`` 0 drops nothing.
    """
    batch, heads, length = scores.shape
    indices = torch.full((batch, heads, length + recent), -1, dtype=torch.int32)
    counts = torch.zeros(batch, heads, dtype=torch.int32)
    for b in range(batch):
        share = scores[b].double().mean(0)
        share = share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)
        tail = share.sort().values.cumsum(0)
        dropped = int((tail < drop_mass).sum()) + 1 if drop_mass > 0 else 0
        keep = min(length, max(min_tokens, length - dropped))
        for h in range(heads):
            best = scores[b, h].argsort(descending=True, stable=True)[:keep].sort().values
            chosen = torch.cat([best.cpu(), torch.arange(length, length + recent)])
            indices[b, h, : len(chosen)] = chosen
            counts[b, h] = len(chosen)
    return TokenSetPlan(indices.to(scores.device), counts.to(scores.device), "query")


def token_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TokenSetPlan, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``: softmax attention over the plan's mask."""
    mask = plan.to_mask(q.shape[1], k.shape[1])
    mask = mask.repeat_interleave(q.shape[2] // mask.shape[1], 1)
    return masked_attention(q, k, v, mask, scale=scale)
