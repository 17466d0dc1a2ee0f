"""Semantic checks of decode and merging; each failure is one sentence with the expected axes."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops._checks import (
    check_axes,
    check_device,
    check_dtype,
    check_heads,
    check_same,
    check_scale,
    check_sinks,
    check_softcap,
    values_readable,
)

__all__ = ["MAX_QUERIES", "check_decode", "check_parts"]

FP8 = torch.float8_e4m3fn
MAX_QUERIES = 16


def check_parts(outs: Tensor, lses: Tensor) -> None:
    """Check stacked ``outs [S, B, Sq, Hq, D]`` against ``lses [S, B, Hq, Sq]``."""
    check_axes("outs", outs, "parts, batch, q_len, q_heads, value_dim")
    check_axes("lses", lses, "parts, batch, q_heads, q_len")
    check_device("outs", outs, "lses", lses)
    wide = torch.float64 if outs.dtype == torch.float64 else torch.float32
    check_dtype("lses", lses, wide)
    parts, batch, q_len, heads, _ = outs.shape
    if parts == 0:
        raise ValueError("outs must hold at least one part, got none")
    expected = (parts, batch, heads, q_len)
    check_same("(parts, batch, q_heads, q_len)", "outs", expected, "lses", tuple(lses.shape))


def check_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    scale: float | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Check everything that a decode call has but its window."""
    _check_tensors(q, k, v, cache_seqlens, page_table)
    _check_options(q, k, softcap, sinks, scale, k_scale, v_scale)
    _check_lengths(q, k, cache_seqlens, page_table)


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, page_table: Tensor | None
) -> None:
    """Check axes, dtypes, devices and heads of everything that a decode call must have."""
    check_axes("q", q, "batch, q_len, q_heads, head_dim")
    slots = "batch, capacity" if page_table is None else "pages, page_size"
    check_axes("k_cache", k, f"{slots}, kv_heads, head_dim")
    check_axes("v_cache", v, f"{slots}, kv_heads, value_dim")
    check_axes("cache_seqlens", cache_seqlens, "batch")
    for name, tensor in (("k_cache", k), ("v_cache", v), ("cache_seqlens", cache_seqlens)):
        check_device("q", q, name, tensor)
    dtype, cache_dtype = q.dtype, k.dtype
    if cache_dtype not in (dtype, FP8):
        raise TypeError(
            f"k_cache must be fp8 e4m3 or of q's dtype {dtype}, got {cache_dtype}: "
            "cast one of them"
        )
    if dtype == FP8:
        raise TypeError("q must not be fp8 in decode, only the cache: use .to(torch.bfloat16)")
    check_dtype("v_cache", v, cache_dtype)
    batch, q_len, q_heads, head_dim = q.shape
    *k_slots, kv_heads, k_dim = k.shape
    *v_slots, v_heads, _ = v.shape
    if k_slots != v_slots:
        check_same(slots, "k_cache", tuple(k_slots), "v_cache", tuple(v_slots))
    check_same("kv_heads", "k_cache", kv_heads, "v_cache", v_heads)
    check_same("head_dim", "q", head_dim, "k_cache", k_dim)
    check_heads(q_heads, kv_heads)
    check_dtype("cache_seqlens", cache_seqlens, torch.int32)
    check_same("batch", "q", batch, "cache_seqlens", cache_seqlens.shape[0])
    if page_table is None:
        check_same("batch", "q", batch, "k_cache", k_slots[0])
    else:
        check_axes("page_table", page_table, "batch, max_pages")
        check_device("q", q, "page_table", page_table)
        check_dtype("page_table", page_table, torch.int32)
        check_same("batch", "q", batch, "page_table", page_table.shape[0])
    if not 1 <= q_len <= MAX_QUERIES:
        raise ValueError(
            f"q_len must be 1 to {MAX_QUERIES} in decode, got {q_len}: longer runs of tokens "
            "are for flash_attention"
        )


def _check_options(
    q: Tensor,
    k: Tensor,
    softcap: float,
    sinks: Tensor | None,
    scale: float | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Check what a decode call may have besides."""
    check_softcap(softcap)
    check_sinks(sinks, q, q.shape[2])
    if scale is not None:
        check_scale(scale)
    for name, factors in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factors is None:
            continue
        if k.dtype != FP8:
            raise TypeError(f"{name} is for an fp8 e4m3 cache, k_cache is {k.dtype}: leave it out")
        check_axes(name, factors, "batch, kv_heads")
        check_dtype(name, factors, torch.float32)
        check_device("q", q, name, factors)
        expected = (q.shape[0], k.shape[2])
        check_same("shape", name, tuple(factors.shape), "(batch, kv_heads)", expected)


def _check_lengths(q: Tensor, k: Tensor, cache_seqlens: Tensor, page_table: Tensor | None) -> None:
    """Read lengths and page numbers: every sequence holds the queries and fits the cache."""
    if not values_readable(cache_seqlens) or cache_seqlens.numel() == 0:
        return
    lengths = cache_seqlens.tolist()
    capacity = k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
    if min(lengths) < q.shape[1]:
        raise ValueError(
            f"cache_seqlens must count the {q.shape[1]} query tokens too, got {min(lengths)}: "
            "append their keys first"
        )
    if max(lengths) > capacity:
        raise ValueError(
            f"cache_seqlens must fit the cache's {capacity} slots a sequence, got {max(lengths)}"
        )
    if page_table is None:
        return
    pages, page_size = k.shape[:2]
    used = torch.arange(page_table.shape[1]) * page_size < cache_seqlens.cpu().unsqueeze(1)
    numbers = page_table.cpu()[used]
    if ((numbers < 0) | (numbers >= pages)).any():
        raise ValueError(
            f"page_table must name pages 0 to {pages - 1}, got {int(numbers.min())} to "
            f"{int(numbers.max())} among the pages in use"
        )
