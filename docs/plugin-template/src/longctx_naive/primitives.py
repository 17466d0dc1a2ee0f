"""The primitives: plain functions of tensors, with the names and shapes of the protocol."""

from __future__ import annotations

import torch
from torch import Tensor


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, **neutral: object
) -> tuple[Tensor, Tensor]:
    """Return ``(out [B, Sq, Hq, Dv], lse [B, Hq, Sq])``; core keeps undeclared options away."""
    group = q.shape[2] // k.shape[2]
    wide = (t.transpose(1, 2).float() for t in (q, k, v))  # [B, H, S, D]
    query, key, value = wide
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = scale * query @ key.mT
    if causal:  # aligned bottom-right
        q_len, k_len = scores.shape[-2:]
        future = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(future.triu(k_len - q_len + 1), -torch.inf)
    lse = scores.logsumexp(-1)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)  # an empty row gives 0, not NaN
    out = torch.exp(scores - shift.unsqueeze(-1)) @ value
    return out.transpose(1, 2).contiguous().to(v.dtype), lse


def merge_forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``outs [S, B, Sq, Hq, D]`` with ``lses [S, B, Hq, Sq]`` over their first axis."""
    lse = lses.logsumexp(0)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(lses - shift).transpose(-1, -2).unsqueeze(-1)  # [S, B, Sq, Hq, 1]
    # a part with weight 0 may hold anything, NaN too
    parts = outs.float().masked_fill(weights == 0, 0.0)
    return (weights * parts).sum(0).to(outs.dtype), lse
