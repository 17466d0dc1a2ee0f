"""Semantic checks of the DSA family; each failure is one sentence with the expected axes."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.errors import nearest_name
from longctx.ops._checks import (
    check_attention_inputs,
    check_axes,
    check_device,
    check_dtype,
    check_same,
    check_scale,
    check_sinks,
    values_readable,
)
from longctx.plans import TopKPlan

__all__ = ["FP8", "both_bounds", "check_index_inputs", "check_quantize_input", "check_topk_inputs"]

FP8 = torch.float8_e4m3fn
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
SCALE_FORMATS = ("fp32", "ue8m0")


def check_quantize_input(x: Tensor, scale_format: str) -> None:
    """Check the rows to quantise and the name of the scale format."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor (..., channels), got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x must be (..., channels) with at least one channel, got shape {tuple(x.shape)}"
        )
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"x must have a unit stride in its last axis, got strides {tuple(x.stride())}: "
            "call .contiguous()"
        )
    check_dtype("x", x, *HALF_AND_SINGLE)
    if scale_format not in SCALE_FORMATS:
        raise ValueError(
            f"no fp8 scale format is called {scale_format!r}: "
            f"{nearest_name(str(scale_format), SCALE_FORMATS)}"
        )


def check_index_inputs(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    q_name: str,
    k_name: str,
    double: bool,
) -> None:
    """Check ``q [B, Sq, Hi, Di]``, ``k [B, Sk, Di]``, ``weights [B, Sq, Hi]`` against each other.

    The names are those of q and k in the caller's signature; ``double`` admits fp64.
    """
    check_axes(q_name, q, "batch, q_len, index_heads, index_dim")
    check_axes(k_name, k, "batch, k_len, index_dim")
    check_axes("weights", weights, "batch, q_len, index_heads")
    check_dtype(q_name, q, *HALF_AND_SINGLE, FP8, *((torch.float64,) if double else ()))
    if k.dtype != q.dtype:
        raise TypeError(
            f"{q_name} and {k_name} must share a dtype, got {q.dtype} and {k.dtype}: "
            "cast one of them"
        )
    check_dtype("weights", weights, torch.float64 if q.dtype == torch.float64 else torch.float32)
    check_same("batch", q_name, q.shape[0], k_name, k.shape[0])
    check_same("index_dim", q_name, q.shape[3], k_name, k.shape[2])
    expected = tuple(q.shape[:3])
    check_same("(batch, q_len, index_heads)", q_name, expected, "weights", tuple(weights.shape))
    check_device(q_name, q, k_name, k)
    check_device(q_name, q, "weights", weights)
    if k_scale is not None:
        check_axes("k_scale", k_scale, "batch, k_len")
        check_dtype("k_scale", k_scale, torch.float32)
        check_same("(batch, k_len)", k_name, tuple(k.shape[:2]), "k_scale", tuple(k_scale.shape))
        check_device(q_name, q, "k_scale", k_scale)
    elif k.dtype == FP8:
        raise ValueError(
            f"fp8 {k_name} needs its scales (batch, k_len), got k_scale=None: pass the scale that "
            "quantize_fp8 returned"
        )
    _check_key_range(key_start, key_end, q_name, q, k.shape[1])


def _check_key_range(
    key_start: Tensor | None, key_end: Tensor | None, q_name: str, q: Tensor, k_len: int
) -> None:
    for name, bound in (("key_start", key_start), ("key_end", key_end)):
        if bound is None:
            continue
        check_axes(name, bound, "batch, q_len")
        check_dtype(name, bound, torch.int32)
        check_same("(batch, q_len)", q_name, tuple(q.shape[:2]), name, tuple(bound.shape))
        check_device(q_name, q, name, bound)
        if values_readable(bound) and bound.numel():
            low, high = (int(t) for t in bound.aminmax())
            if low < 0 or high > k_len:
                raise ValueError(
                    f"{name} must lie between 0 and k_len = {k_len}, got values from {low} to "
                    f"{high}"
                )
    if key_start is None or key_end is None or not values_readable(key_start):
        return
    crossed = (key_start > key_end).nonzero()
    if len(crossed):
        b, row = crossed[0].tolist()
        raise ValueError(
            f"key_start must not exceed key_end, got {int(key_start[b, row])} > "
            f"{int(key_end[b, row])} at batch {b}, query {row}"
        )


def both_bounds(
    key_start: Tensor | None, key_end: Tensor | None, k_len: int
) -> tuple[Tensor | None, Tensor | None]:
    """Fill in a missing bound: backends get both or none."""
    if key_start is None and key_end is not None:
        key_start = torch.zeros_like(key_end)
    elif key_end is None and key_start is not None:
        key_end = torch.full_like(key_start, k_len)
    return key_start, key_end


def check_topk_inputs(
    q: Tensor, k: Tensor, v: Tensor, plan: TopKPlan, scale: float, sinks: Tensor | None
) -> None:
    """Check attention inputs, and that the plan was made for them."""
    check_attention_inputs(q, k, v)
    check_scale(scale)
    check_sinks(sinks, q, q.shape[2])
    if not isinstance(plan, TopKPlan):
        raise TypeError(f"plan must be a TopKPlan, got {type(plan).__name__}")
    if plan.head_axis == "query":
        raise ValueError(
            "a TopKPlan has one set for all heads or one a KV head, got head_axis='query': "
            "lower it"
        )
    k_len = k.shape[1]
    plan.check(
        batch=q.shape[0], q_heads=q.shape[2], kv_heads=k.shape[2], q_len=q.shape[1], k_len=k_len
    )
    check_device("q", q, "plan.indices", plan.indices)
    if values_readable(plan.indices) and plan.indices.numel():
        low, high = (int(t) for t in plan.indices.aminmax())
        units = -(-k_len // plan.page_size)
        if low < -1 or high >= units:
            pages = f" in pages of {plan.page_size}" if plan.page_size > 1 else ""
            raise ValueError(
                f"plan.indices must lie between -1 and {units - 1} for k_len {k_len}{pages}, "
                f"got values from {low} to {high}"
            )
