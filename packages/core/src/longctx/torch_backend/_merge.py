"""Exact merging of partial softmax results by their log-sum-exp, safe for empty parts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_sinks_", "merge_pair", "merge_parts"]

_AT_ONCE = 2**25
"""Elements of partial results that are widened all at once; larger ones go part by part."""


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``outs [S, ..., D]`` with ``lses [S, ...]`` (aligned axes) over the first axis.

    ``lse = m + log sum_s exp(lse_s - m)`` with ``m = max_s lse_s``: gaps of any size are exact.
    A part whose lse is -inf is masked, not multiplied by 0, for its ``out`` may hold NaN.
    """
    top = lses.amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    share = weights / torch.where(total == 0, 1.0, total)
    if outs.numel() <= _AT_ONCE:
        held = outs.to(lses.dtype).masked_fill((lses == -torch.inf).unsqueeze(-1), 0.0)
        return (held * share.unsqueeze(-1)).sum(0).to(outs.dtype), top + torch.log(total)
    merged = torch.zeros(outs.shape[1:], dtype=lses.dtype, device=outs.device)
    for out, part, lse in zip(outs, share, lses, strict=True):
        held = out.to(merged.dtype).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
        merged.addcmul_(held, part.unsqueeze(-1))
    return merged.to(outs.dtype), top + torch.log(total)


def merge_pair(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge two ``(out [B, Sq, Hq, Dv], lse [B, Hq, Sq])`` that never hold NaN."""
    (out_a, lse_a), (out_b, lse_b) = first, second
    lse = torch.logaddexp(lse_a, lse_b)
    share_b = torch.exp(lse_b - torch.where(lse == -torch.inf, 0.0, lse))
    weight = share_b.transpose(1, 2).unsqueeze(-1)
    return torch.lerp(out_a.to(lse.dtype), out_b.to(lse.dtype), weight).to(out_a.dtype), lse


def add_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Add logits ``[Hq]`` to the denominator: scale ``out`` in place, return the new lse."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
    share = torch.exp(lse - torch.where(total == -torch.inf, 0.0, total))
    out.mul_(share.transpose(1, 2).unsqueeze(-1))
    return total
