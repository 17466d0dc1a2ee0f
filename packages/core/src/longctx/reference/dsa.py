"""Oracle of DeepSeek Sparse Attention: fp8 quantiser, lightning indexer, top-k, chosen attention.

``I[t, s] = k_scale[s] sum_h w[t, h] relu(q[t, h] . k[s])``, ``S_t = top-k_s I[t, s]``, and softmax
attention of query ``t`` over ``S_t``; DeepSeek-V3.2-Exp, section 2.1, equations 1 and 2. Scores
are computed in the dtype of ``weights``: double-precision weights make them double.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.plans import TopKPlan
from longctx.reference.flash import masked_attention

__all__ = ["index_scores", "index_topk", "quantize_fp8", "topk_attention"]


def quantize_fp8(x: Tensor, *, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    """Return ``(x8, scale)``: ``scale = max(amax, 1e-4) / 448`` a row, ``x8 = round(x / scale)``.

    ``scale_format="ue8m0"`` rounds the scale up to a power of two (inference/kernel.py,
    ``act_quant_kernel``, of DeepSeek-V3.2-Exp).
    """
    x = x.float()
    amax = x.abs().amax(-1).clamp(min=1e-4)
    # on a GPU torch divides by a number as it multiplies by its reciprocal, which rounds twice
    scale = amax / torch.full_like(amax, 448)
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale.double())
        power = exponent - (mantissa == 0.5).to(exponent.dtype)
        scale = torch.ldexp(torch.ones_like(mantissa), power).float()
    values = (x / scale.unsqueeze(-1)).clamp(-448, 448)
    return values.to(torch.float8_e4m3fn), scale


def index_mask(
    q_len: int,
    k_len: int,
    *,
    causal: bool,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the pairs that the indexer may score, bool ``[B or 1, q_len, k_len]``."""
    columns = torch.arange(k_len, device=device)
    keep = torch.ones(1, q_len, k_len, dtype=torch.bool, device=device)
    if causal:
        rows = torch.arange(k_len - q_len, k_len, device=device)
        keep = keep & (columns <= rows.unsqueeze(1))
    if key_start is not None:
        keep = keep & (columns >= key_start.unsqueeze(-1))
    if key_end is not None:
        keep = keep & (columns < key_end.unsqueeze(-1))
    return keep


def index_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    causal: bool = True,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """Return ``I [B, Sq, Sk]``; -inf outside the causal bound and the key range."""
    dots = torch.einsum("bihd,bjd->bihj", q.to(weights.dtype), k.to(weights.dtype))
    scores = torch.einsum("bihj,bih->bij", dots.relu(), weights)
    if k_scale is not None:
        scores = scores * k_scale.to(weights.dtype).unsqueeze(1)
    keep = index_mask(
        q.shape[1],
        k.shape[1],
        causal=causal,
        key_start=key_start,
        key_end=key_end,
        device=q.device,
    )
    return scores.masked_fill(~keep, -torch.inf)


def index_topk(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    top_k: int,
    *,
    causal: bool = True,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """Return int32 ``[B, Sq, 1, top_k]``: a stable sort by falling score, so ties go to low keys.

    Scores of -inf and NaN are never chosen; the chosen ones stand ascending, then -1.
    """
    scores = index_scores(
        q, k, weights, k_scale=k_scale, causal=causal, key_start=key_start, key_end=key_end
    )
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    best, order = scores.sort(dim=-1, descending=True, stable=True)
    k_len = k.shape[1]
    chosen = order[..., :top_k].masked_fill(best[..., :top_k] == -torch.inf, k_len)
    chosen = chosen.sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, top_k - chosen.shape[-1]), value=k_len)
    return chosen.masked_fill(chosen == k_len, -1).to(torch.int32).unsqueeze(2)


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TopKPlan,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``: softmax attention over the plan's mask, in the inputs' precision."""
    mask = plan.to_mask(q.shape[1], k.shape[1])
    mask = mask.repeat_interleave(q.shape[2] // mask.shape[1], 1)
    return masked_attention(q, k, v, mask, scale=scale, sinks=sinks)
