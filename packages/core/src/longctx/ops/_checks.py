"""Semantic checks shared by the public ops; each failure is one sentence with the expected axes.

Checks that read tensor values would synchronise with a GPU: on CUDA they run only with
``LONGCTX_CHECK_VALUES=1``. Everything is skipped while ``torch.compile`` traces.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from longctx.settings import switched_on

__all__ = [
    "check_attention_inputs",
    "check_axes",
    "check_cu_seqlens",
    "check_dtype",
    "check_positive",
    "check_same",
    "check_scale",
    "check_sinks",
    "check_window",
    "values_readable",
]


def values_readable(tensor: Tensor) -> bool:
    """Return whether a check may read the tensor's values."""
    return tensor.device.type == "cpu" or switched_on("LONGCTX_CHECK_VALUES")


def check_axes(name: str, tensor: Tensor, axes: str) -> None:
    """Raise if ``tensor`` is not a tensor with the named axes and a unit last stride."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor ({axes}), got {type(tensor).__name__}")
    ndim = tensor.ndim
    if ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must be ({axes}), got shape {tuple(tensor.shape)}")
    if ndim > 1 and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must have a unit stride in its last axis, got strides "
            f"{tuple(tensor.stride())}: call .contiguous()"
        )


def check_same(what: str, first: str, a: object, second: str, b: object, mend: str = "") -> None:
    """Raise if two properties differ."""
    if a != b:
        raise ValueError(
            f"{first} and {second} must agree in {what}, got {a} and {b}"
            + (f": {mend}" if mend else "")
        )


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise if the dtype is none of the given ones."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        first = names.partition(" ")[0]
        raise TypeError(f"{name} must be {names}, got {got}: use .to(torch.{first})")


def check_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raise if two tensors live on different devices."""
    if a.device != b.device:
        raise ValueError(
            f"{first} and {second} must be on one device, got {a.device} and {b.device}: "
            f"move {second} to {a.device}"
        )


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check ``q [B, Sq, Hq, D]``, ``k [B, Sk, Hkv, D]``, ``v [B, Sk, Hkv, Dv]``."""
    if _fit(q, k, v):
        return
    check_axes("q", q, "batch, q_len, q_heads, head_dim")
    check_axes("k", k, "batch, k_len, kv_heads, head_dim")
    check_axes("v", v, "batch, k_len, kv_heads, value_dim")
    for name, other in (("k", k), ("v", v)):
        check_device("q", q, name, other)
        if other.dtype != q.dtype:
            raise TypeError(
                f"q and {name} must share a dtype, got {q.dtype} and {other.dtype}: "
                "cast one of them"
            )
    batch, _, q_heads, head_dim = q.shape
    k_batch, k_len, kv_heads, k_dim = k.shape
    v_batch, v_len, v_heads, _ = v.shape
    check_same("batch", "q", batch, "k", k_batch)
    check_same("batch", "q", batch, "v", v_batch)
    check_same("k_len", "k", k_len, "v", v_len)
    check_same("kv_heads", "k", kv_heads, "v", v_heads)
    check_same("head_dim", "q", head_dim, "k", k_dim)
    check_heads(q_heads, kv_heads)


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether inputs pass without a closer look, which takes longer and finds words."""
    try:
        batch, _, q_heads, head_dim = q.shape
        k_batch, k_len, kv_heads, k_dim = k.shape
        v_batch, v_len, v_heads, _ = v.shape
        return (
            q.stride(3) == k.stride(3) == v.stride(3) == 1
            and q.dtype == k.dtype == v.dtype
            and q.device == k.device == v.device
            and batch == k_batch == v_batch
            and k_len == v_len
            and head_dim == k_dim
            and kv_heads == v_heads
            and kv_heads > 0
            and q_heads % kv_heads == 0
        )
    except (AttributeError, TypeError, ValueError):  # not tensors, or of other ranks
        return False


def check_heads(q_heads: int, kv_heads: int) -> None:
    """Raise unless the query heads are a multiple of the KV heads."""
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"q_heads must be a multiple of kv_heads, got q_heads={q_heads}, kv_heads={kv_heads}"
        )


def check_scale(scale: float) -> None:
    """Raise unless the scale is a finite number."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_positive(name: str, value: int, least: int = 1) -> None:
    """Raise unless an integer reaches its least value."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """Return the window as ``(left, right)``; raise unless each is None or at least 0."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be (left, right), got {window!r}")
    for side, size in zip(("left", "right"), window, strict=True):
        if size is not None and size < 0:
            raise ValueError(f"window {side} must be at least 0, or None for no limit, got {size}")
    return window


def check_softcap(softcap: float) -> None:
    """Raise unless the softcap is finite and not negative."""
    if not math.isfinite(softcap) or softcap < 0:
        raise ValueError(f"softcap must be finite and at least 0 (0 is off), got {softcap}")


def check_sinks(sinks: Tensor | None, q: Tensor, q_heads: int) -> None:
    """Check learned sink logits ``[Hq]`` fp32."""
    if sinks is None:
        return
    check_axes("sinks", sinks, "q_heads")
    check_device("q", q, "sinks", sinks)
    check_dtype("sinks", sinks, torch.float32, torch.float64)
    check_same("q_heads", "q", q_heads, "sinks", sinks.shape[0])


def check_cu_seqlens(name: str, cu_seqlens: Tensor, batch: int, total: int) -> None:
    """Check cumulative lengths: int32 ``[N + 1]``, 0 first, never decreasing, ``total`` last."""
    check_axes(name, cu_seqlens, "sequences + 1")
    check_dtype(name, cu_seqlens, torch.int32)
    if batch != 1:
        raise ValueError(f"packed sequences need batch 1, got batch {batch} with {name}")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} needs at least two entries, got {cu_seqlens.shape[0]}")
    if not values_readable(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total:
        raise ValueError(
            f"{name} must begin at 0 and end at the total length {total}, "
            f"got {ends[0]} and {ends[-1]}"
        )
    if any(end < start for start, end in pairwise(ends)):
        raise ValueError(f"{name} must not decrease, got {ends}")
