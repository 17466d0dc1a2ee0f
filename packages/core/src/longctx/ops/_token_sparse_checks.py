"""Semantic checks of token-sparse attention; each failure is one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.errors import nearest_name
from longctx.ops._checks import (
    check_attention_inputs,
    check_axes,
    check_device,
    check_dtype,
    check_heads,
    check_positive,
    check_same,
    check_scale,
    values_readable,
)
from longctx.plans import TokenSetPlan

__all__ = ["check_score_inputs", "check_select_inputs", "check_token_set_inputs"]

HEAD_AXES = ("query", "kv", "shared")


def check_score_inputs(q_recent: Tensor, k: Tensor, pool: int, scale: float) -> None:
    """Check ``q_recent [B, W, Hq, D]`` against ``k [B, Sk, Hkv, D]``."""
    check_axes("q_recent", q_recent, "batch, window, q_heads, head_dim")
    check_axes("k", k, "batch, k_len, kv_heads, head_dim")
    check_device("q_recent", q_recent, "k", k)
    if k.dtype != q_recent.dtype:
        raise TypeError(
            f"q_recent and k must share a dtype, got {q_recent.dtype} and {k.dtype}: cast one of "
            "them"
        )
    check_same("batch", "q_recent", q_recent.shape[0], "k", k.shape[0])
    check_same("head_dim", "q_recent", q_recent.shape[3], "k", k.shape[3])
    check_heads(q_recent.shape[2], k.shape[2])
    check_positive("the window of q_recent", q_recent.shape[1])
    if q_recent.shape[1] > k.shape[1]:
        raise ValueError(
            f"the window of q_recent must fit into k_len, got {q_recent.shape[1]} queries and "
            f"{k.shape[1]} keys: k holds the keys of the recent tokens, too"
        )
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"pool must be odd and at least 1, got {pool}")
    check_scale(scale)


def check_select_inputs(
    scores: Tensor, drop_mass: float, min_tokens: int, recent: int, head_axis: str
) -> None:
    """Check ``scores [B, Hx, L]`` and the budget."""
    check_axes("scores", scores, "batch, heads, prefix_len")
    check_dtype("scores", scores, torch.float32, torch.float64)
    if not 0 <= drop_mass <= 1:
        raise ValueError(f"drop_mass must lie between 0 and 1, got {drop_mass}")
    check_positive("min_tokens", min_tokens, 0)
    check_positive("recent", recent, 0)
    if head_axis not in HEAD_AXES:
        raise ValueError(
            f"no head axis is called {head_axis!r}: {nearest_name(str(head_axis), HEAD_AXES)}"
        )
    if values_readable(scores) and scores.numel():
        low, high = (float(t) for t in scores.aminmax())
        if not (low >= 0 and high < float("inf")):
            raise ValueError(
                f"scores must be finite and at least 0, got values from {low} to {high}"
            )


def check_token_set_inputs(
    q: Tensor, k: Tensor, v: Tensor, plan: TokenSetPlan, scale: float
) -> None:
    """Check attention inputs, and that the plan was made for them."""
    check_attention_inputs(q, k, v)
    check_scale(scale)
    q_len, k_len = q.shape[1], k.shape[1]
    if q_len > k_len:
        raise ValueError(
            "the queries are the last of the tokens: q_len must be at most k_len, got "
            f"{q_len} and {k_len}"
        )
    if not isinstance(plan, TokenSetPlan):
        raise TypeError(f"plan must be a TokenSetPlan, got {type(plan).__name__}")
    plan.check(batch=q.shape[0], q_heads=q.shape[2], kv_heads=k.shape[2], q_len=q_len, k_len=k_len)
    check_device("q", q, "plan.indices", plan.indices)
    check_device("q", q, "plan.counts", plan.counts)
    if values_readable(plan.indices):
        _check_sets(plan.indices, plan.counts, k_len)


def _check_sets(indices: Tensor, counts: Tensor, k_len: int) -> None:
    capacity = indices.shape[2]
    if not counts.numel():
        return
    low, high = (int(t) for t in counts.aminmax())
    if low < 0 or high > capacity:
        raise ValueError(
            f"plan.counts must lie between 0 and the capacity {capacity}, got values from {low} "
            f"to {high}"
        )
    inside = torch.arange(capacity, device=indices.device) < counts.unsqueeze(2)
    tokens = indices.where(inside, 0)
    if not capacity or not high:
        return
    low, high = (int(t) for t in tokens.aminmax())
    if low < 0 or high >= k_len:
        raise ValueError(
            f"plan.indices must lie between 0 and {k_len - 1} up to the count, got values from "
            f"{low} to {high}: the plan was made for another length"
        )
    falling = (tokens.diff(dim=2) <= 0) & inside[..., 1:]
    if falling.any():
        b, h, slot = falling.nonzero()[0].tolist()
        raise ValueError(
            f"plan.indices must ascend without repeats, got {int(tokens[b, h, slot])} then "
            f"{int(tokens[b, h, slot + 1])} at batch {b}, set {h}"
        )
