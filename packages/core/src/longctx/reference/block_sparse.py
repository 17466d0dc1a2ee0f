"""Oracle of attention under a plan: the plan's own mask, then softmax over what it keeps.

``o_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the pairs of ``plan.to_mask``; the patterns are
those of FlexAttention's BlockMask (blocks), MInference, arXiv 2407.02490 (stripes) and
StreamingLLM, arXiv 2309.17453 (windows).
"""

from __future__ import annotations

from torch import Tensor

from longctx.plans import BlockPlan, StripePlan, WindowPlan
from longctx.reference.flash import masked_attention

__all__ = ["block_sparse_attention", "plan_mask"]


def plan_mask(
    plan: BlockPlan | StripePlan | WindowPlan, q: Tensor, k: Tensor, *, causal: bool = True
) -> Tensor:
    """Return the kept pairs a query head, bool ``[B or 1, Hq, Sq, Sk]``."""
    if isinstance(plan, BlockPlan):
        mask = plan.to_mask(q.shape[1], k.shape[1], device=q.device, causal=causal)
    else:
        mask = plan.to_mask(q.shape[1], k.shape[1], device=q.device)
    return mask.repeat_interleave(q.shape[2] // mask.shape[1], 1)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | StripePlan | WindowPlan,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of `longctx.block_sparse_attention_with_lse`, in q's precision."""
    return masked_attention(q, k, v, plan_mask(plan, q, k, causal=causal), scale=scale)
