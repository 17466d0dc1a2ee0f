"""Oracle of exact softmax attention.

``s_ij = scale q_i . k_j`` (softcapped), ``lse_i = log(sum_j exp s_ij + exp sink)``,
``o_i = sum_j exp(s_ij - lse_i) v_j`` over the kept pairs; Dao, arXiv 2307.08691, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flash_attention", "flash_mask", "masked_attention"]


def flash_mask(
    q_len: int,
    k_len: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the kept pairs of causal and windowed attention, bool ``[q_len, k_len]``."""
    rows = torch.arange(k_len - q_len, k_len, device=device).unsqueeze(1)
    columns = torch.arange(k_len, device=device).unsqueeze(0)
    keep = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    left, right = window or (None, None)
    if causal:
        keep &= columns <= rows
    if left is not None:
        keep &= rows - columns <= left
    if right is not None:
        keep &= columns - rows <= right
    return keep


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the True pairs of ``mask``, broadcastable to ``[B, Hq, Sq, Sk]``.

    Returns
    -------
    out : Tensor, (batch, q_len, q_heads, value_dim)
    lse : Tensor, (batch, q_heads, q_len)
        Natural log; -inf and out 0 for a row with no True pair and no sink.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    denominator = scores
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        denominator = torch.cat([scores, column], -1)
    lse = torch.logsumexp(denominator, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of `longctx.flash_attention_with_lse`, in the inputs' precision."""
    mask = flash_mask(q.shape[1], k.shape[1], causal=causal, window=window, device=q.device)
    if cu_seqlens_q is not None:
        ends_k = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
        ends_q = cu_seqlens_q.tolist()
        mask = torch.zeros_like(mask)
        for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
            mask[q0:q1, k0:k1] = flash_mask(q1 - q0, k1 - k0, causal=causal, window=window)
    return masked_attention(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
