"""Attention over a KV cache, and merging: dispatch and the ``torch.library`` contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.dispatch import BoundBackend, bound_to, choose, primitive
from longctx.ops._checks import check_device, check_window
from longctx.ops._decode_checks import check_decode, check_parts
from longctx.ops._library import call, define, needs_gradient
from longctx.ops._once import check_once
from longctx.protocols.attention import AttentionOutput

__all__ = ["decode_attention", "decode_attention_with_lse", "merge_attention"]

FP8 = torch.float8_e4m3fn


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Attention of 1 to 16 new tokens over a contiguous or paged KV cache.

    The new tokens' keys and values are in the cache already. Query ``i`` stands at position
    ``cache_seqlens - q_len + i`` and sees nothing behind itself.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
        bf16, fp16, fp32 or fp64; ``q_len`` 1 to 16.
    k_cache : Tensor, (batch, capacity, kv_heads, head_dim)
        Or ``(pages, page_size, kv_heads, head_dim)`` with ``page_table``; q's dtype or fp8 e4m3.
        ``q_heads`` is a multiple of ``kv_heads``; heads are never repeated in memory. Slots that
        no sequence uses may hold anything, NaN included.
    v_cache : Tensor, (batch, capacity, kv_heads, value_dim)
        Or paged like ``k_cache``; its dtype.
    cache_seqlens : Tensor, (batch,), int32
        Keys of each sequence, the new tokens included: at least ``q_len``. The torch backend reads
        them on the host for CPU tensors alone.
    page_table : Tensor, (batch, max_pages), int32, optional
        Pages of each sequence in order; entries past its length are ignored.
    window : (left, right), optional
        ``left`` earlier keys are seen besides the query's own; ``right`` must be None or 0.
    softcap : float
        ``c``: scores become ``c tanh(s / c)``; 0 is off.
    sinks : Tensor, (q_heads,), float32, optional
        Learned logits that enter the softmax denominator alone.
    scale : float, optional
        Default ``head_dim ** -0.5``.
    k_scale, v_scale : Tensor, (batch, kv_heads), float32, optional
        Factors of an fp8 cache.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, q_len, q_heads, value_dim)
        In q's dtype.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes, lengths or page numbers do not fit (values are read on a CPU, or with
        ``LONGCTX_CHECK_VALUES=1``).
    UnsupportedError
        If no backend, or not the one asked for, can run the request; also when a gradient is asked
        for, which decode does not have.

    Notes
    -----
    Split over the keys and merged by log-sum-exp, as in Flash-Decoding; paged as in vLLM
    (arXiv 2309.06180).

    Examples
    --------
    >>> import longctx, torch
    >>> q = torch.randn(2, 1, 8, 64)
    >>> k_cache = v_cache = torch.randn(2, 32, 2, 64)
    >>> lengths = torch.tensor([7, 32], dtype=torch.int32)
    >>> longctx.decode_attention(q, k_cache, v_cache, cache_seqlens=lengths).shape
    torch.Size([2, 1, 8, 64])
    """
    return decode_attention_with_lse(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        page_table=page_table,
        window=window,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        k_scale=k_scale,
        v_scale=v_scale,
        backend=backend,
    ).out


def decode_attention_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | BoundBackend | None = None,
) -> AttentionOutput:
    """`decode_attention` that also returns the log-sum-exp, for exact merging.

    Parameters are those of `decode_attention`.

    Returns
    -------
    AttentionOutput
        ``out`` and ``lse`` fp32 ``[batch, q_heads, q_len]`` (natural log, sinks included; fp64 for
        fp64 queries).
    """
    left, right = check_window(window)
    if right not in (None, 0):
        raise ValueError(
            f"window right must be None or 0 in decode, where nothing comes later, got {right}"
        )
    if not torch.compiler.is_compiling():
        check_once(
            check_decode, q, k_cache, v_cache, cache_seqlens, page_table,
            softcap, sinks, scale, k_scale, v_scale,
        )  # fmt: skip
    _, q_len, q_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    features: tuple[str, ...] = () if page_table is None else ("paged",)
    if q_len > 1:
        features += ("multi-token",)
    if k_cache.dtype == FP8:
        features += ("fp8",)
    if left is not None:
        features += ("window",)
    if softcap > 0:
        features += ("softcap",)
    if sinks is not None:
        features += ("sinks",)
    chosen = bound_to(backend) or choose(
        "decode_attention",
        q,
        head_dim=head_dim,
        value_dim=v_cache.shape[3],
        q_heads=q_heads,
        kv_heads=k_cache.shape[2],
        features=features,
        gradient=needs_gradient(q, k_cache, v_cache, sinks),
        backend=backend,
    )
    out, lse = call(
        _decode_op, _decode, False,
        q, k_cache, v_cache, cache_seqlens, page_table, sinks, k_scale, v_scale,
        left, softcap, scale, chosen,
    )  # fmt: skip
    return AttentionOutput(out, lse)


def merge_attention(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    backend: str | BoundBackend | None = None,
) -> AttentionOutput:
    """Merge attention over disjoint sets of keys into attention over their union, exactly.

    ``lse = log sum_s exp(lse_s)`` and ``out = sum_s exp(lse_s - lse) out_s``. Sinks belong to
    one of the parts only.

    Parameters
    ----------
    outs : sequence of Tensor, (batch, q_len, q_heads, value_dim)
        Or one Tensor with the parts along a new first axis.
    lses : sequence of Tensor, (batch, q_heads, q_len), float32
        Natural log; -inf marks an empty part, whose ``out`` may hold anything.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    AttentionOutput
        In the dtypes of the parts. Where every part is empty: out 0, lse -inf.

    Raises
    ------
    ValueError, TypeError
        If there is no part, or shapes, dtypes or devices do not fit.
    UnsupportedError
        If no backend can run the request, or a gradient is asked for.

    Examples
    --------
    >>> import longctx, torch
    >>> q = torch.randn(1, 4, 2, 64)
    >>> k = v = torch.randn(1, 10, 2, 64)
    >>> parts = [longctx.flash_attention_with_lse(q, t, t) for t in (k[:, :3], k[:, 3:])]
    >>> whole = longctx.merge_attention([p.out for p in parts], [p.lse for p in parts])
    >>> torch.allclose(whole.out, longctx.flash_attention(q, k, v), atol=1e-6)
    True
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    if not torch.compiler.is_compiling():
        check_once(check_parts, outs, lses)
    chosen = bound_to(backend) or choose(
        "merge_attention",
        outs,
        head_dim=outs.shape[4],
        value_dim=outs.shape[4],
        q_heads=outs.shape[3],
        kv_heads=outs.shape[3],
        gradient=needs_gradient(outs, lses),
        backend=backend,
    )
    out, lse = call(_merge_op, _merge, False, outs, lses, chosen)
    return AttentionOutput(out, lse)


def _stacked(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    if len(parts) == 0:
        raise ValueError(f"{name} must hold at least one part, got none")
    for part in parts[1:]:
        if part.shape != parts[0].shape:
            raise ValueError(
                f"{name} must share a shape, got {tuple(parts[0].shape)} and {tuple(part.shape)}"
            )
        check_device(f"{name}[0]", parts[0], f"{name}[1:]", part)
        if part.dtype != parts[0].dtype:
            raise TypeError(f"{name} must share a dtype, got {parts[0].dtype} and {part.dtype}")
    return torch.stack(list(parts))


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    window_left: int | None,
    softcap: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "decode_forward")(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        page_table=page_table,
        window_left=window_left,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return result


def _decode_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _head_dim = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, q_len, heads, v_cache.shape[3], dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, q_len, dtype=lse_dtype, device=q.device)


def _merge(outs: Tensor, lses: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "merge_forward")(outs, lses)
    return result


def _merge_fake(outs: Tensor, lses: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device),
        torch.empty(lses.shape[1:], dtype=lses.dtype, device=lses.device),
    )


_decode_op = define(
    "decode_forward",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? page_table, "
    "Tensor? sinks, Tensor? k_scale, Tensor? v_scale, SymInt? window_left, float softcap, "
    "float scale, str backend) -> (Tensor, Tensor)",
    _decode,
    _decode_fake,
)
_merge_op = define(
    "merge_forward",
    "(Tensor outs, Tensor lses, str backend) -> (Tensor, Tensor)",
    _merge,
    _merge_fake,
)
