"""Plans: what a sparsity selector may return and a backend executes.

A plan is frozen data: int32 tensors padded to a capacity (padding is -1) with counts on the
device, an explicit head axis and absolute key positions. Queries stand at the end of the keys:
query ``i`` has position ``i + k_len - q_len``, so chunked prefill and shards are ordinary cases.
Every plan has `to_mask`, its oracle (small sizes only), and `density`, the share of the causal
pairs that it keeps.
"""

from longctx.plans.base import HeadAxis, Plan, causal_pairs
from longctx.plans.block import BlockPlan
from longctx.plans.retention import RetentionPlan
from longctx.plans.stripe import StripePlan
from longctx.plans.token_set import TokenSetPlan
from longctx.plans.topk import TopKPlan
from longctx.plans.window import WindowPlan

__all__ = [
    "BlockPlan",
    "HeadAxis",
    "Plan",
    "RetentionPlan",
    "StripePlan",
    "TokenSetPlan",
    "TopKPlan",
    "WindowPlan",
    "causal_pairs",
]
