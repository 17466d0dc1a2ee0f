"""Oracle of decode attention: gather each sequence's keys, then mask.

Query ``i`` of a sequence of ``L`` keys stands at ``L - q_len + i``; Flash-Decoding's merge is
``lse = log sum_s exp(lse_s)``, ``out = sum_s exp(lse_s - lse) out_s``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.reference.flash import flash_mask, masked_attention

__all__ = ["decode_attention", "merge_attention"]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of `longctx.decode_attention_with_lse`, in q's precision."""
    results = []
    for b, length in enumerate(cache_seqlens.tolist()):
        held = []
        for cache, factors in ((k_cache, k_scale), (v_cache, v_scale)):
            row = cache[b] if page_table is None else cache[page_table[b].clamp(min=0).long()]
            row = row.reshape(-1, *cache.shape[2:])[:length].to(q.dtype)
            held.append(row if factors is None else row * factors[b].to(q.dtype).unsqueeze(-1))
        k, v = (row.unsqueeze(0) for row in held)
        mask = flash_mask(q.shape[1], length, causal=True, window=window, device=q.device)
        query = q[b : b + 1]
        results.append(
            masked_attention(query, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
        )
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of `longctx.merge_attention` over the first axis."""
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0)).transpose(2, 3).unsqueeze(-1)
    return (weights * outs.masked_fill(weights == 0, 0)).sum(0), lse
