"""DeepSeek Sparse Attention: fp8 quantiser, lightning indexer, top-k, chosen-key attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.dispatch import BoundBackend, bound_to, choose
from longctx.errors import UnsupportedError
from longctx.ops._checks import check_positive
from longctx.ops._dsa_checks import (
    FP8,
    both_bounds,
    check_index_inputs,
    check_quantize_input,
    check_topk_inputs,
)
from longctx.ops._dsa_library import (
    attend,
    attend_op,
    quantize,
    quantize_op,
    score,
    score_op,
    select,
    select_op,
)
from longctx.ops._library import call, detached, needs_gradient
from longctx.ops._once import check_once
from longctx.plans import TopKPlan
from longctx.protocols.attention import AttentionOutput

__all__ = [
    "QuantizedTensor",
    "index_scores",
    "index_topk",
    "quantize_fp8",
    "topk_attention",
    "topk_attention_with_lse",
]


class QuantizedTensor(NamedTuple):
    """Result of `quantize_fp8`.

    Attributes
    ----------
    values : Tensor, (..., channels), float8_e4m3fn
    scale : Tensor, (...), float32
        ``values * scale`` restores a row.
    """

    values: Tensor
    scale: Tensor


def quantize_fp8(
    x: Tensor, *, scale_format: str = "fp32", backend: str | BoundBackend | None = None
) -> QuantizedTensor:
    """Quantise rows to fp8 e4m3 with one scale a row of the last axis.

    ``scale = max(amax, 1e-4) / 448``; the values are ``x / scale``, clamped to +-448 and rounded
    to the nearest, ties to even.

    Parameters
    ----------
    x : Tensor, (..., channels)
        fp32, bf16 or fp16, finite; a unit last stride. In DSA, 128 channels.
    scale_format : {"fp32", "ue8m0"}
        ``"ue8m0"`` rounds the scale up to a power of two (stored as fp32), as DeepSeek-V3.2 does.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    QuantizedTensor
        ``values`` in e4m3 and ``scale`` in fp32. A row of zeros gives zeros.

    Raises
    ------
    ValueError, TypeError
        If the shape, the dtype or the format does not fit.
    UnsupportedError
        If no backend, or not the one asked for, can run the request; or a gradient is wanted.

    Notes
    -----
    ``act_quant_kernel`` in inference/kernel.py of DeepSeek-V3.2-Exp.

    Examples
    --------
    >>> import longctx, torch
    >>> values, scale = longctx.quantize_fp8(torch.tensor([[3.5, -448.0]]), scale_format="ue8m0")
    >>> values.float(), scale
    (tensor([[   3.5000, -448.0000]]), tensor([1.]))
    """
    if not torch.compiler.is_compiling():
        check_once(check_quantize_input, x, scale_format)
    gradient = needs_gradient(x)
    chosen = bound_to(backend) or choose(
        "quantize_fp8",
        x,
        head_dim=x.shape[-1],
        value_dim=x.shape[-1],
        q_heads=1,
        kv_heads=1,
        features=("ue8m0",) if scale_format == "ue8m0" else (),
        gradient=gradient,
        backend=backend,
    )
    return QuantizedTensor(*call(quantize_op, quantize, gradient, x, scale_format, chosen))


def index_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    causal: bool = True,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Score every key for every query with the lightning indexer, as a matrix.

    ``I[t, s] = k_scale[s] sum_h weights[t, h] relu(q[t, h] . k[s])``: what the indexer is trained
    on. To select, call `index_topk`, which never holds the matrix.

    Parameters
    ----------
    q : Tensor, (batch, q_len, index_heads, index_dim)
        fp32, bf16, fp16, fp64 or fp8 e4m3 (whose scale belongs into ``weights``).
    k : Tensor, (batch, k_len, index_dim)
        One key head; q's dtype.
    weights : Tensor, (batch, q_len, index_heads), float32
        May be negative; float64 with fp64 inputs.
    k_scale : Tensor, (batch, k_len), float32, optional
        Factors of the keys; required for fp8.
    causal : bool
        Query ``i`` sees keys up to ``i + k_len - q_len`` (aligned bottom-right).
    key_start, key_end : Tensor, (batch, q_len), int32, optional
        Query ``i`` sees the keys ``[key_start, key_end)``; either may stand alone.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, q_len, k_len), float32
        -inf at the pairs that are not seen; float64 for fp64 inputs.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or arguments do not fit; one sentence with the expected axes.
    UnsupportedError
        If no backend, or not the one asked for, can run the request; or a gradient is wanted
        through fp8 inputs or ``k_scale``.

    Notes
    -----
    DeepSeek-V3.2-Exp, equation 1. Differentiable in q, k and weights; no softmax is applied.

    Examples
    --------
    >>> import longctx, torch
    >>> q, k, weights = torch.randn(1, 5, 4, 64), torch.randn(1, 9, 64), torch.rand(1, 5, 4)
    >>> longctx.index_scores(q, k, weights).isneginf().sum(-1)
    tensor([[4, 3, 2, 1, 0]])
    """
    if not torch.compiler.is_compiling():
        check_once(check_index_inputs, q, k, weights, k_scale, key_start, key_end, "q", "k", True)
    gradient = needs_gradient(q, k, weights, k_scale)
    if gradient and (q.dtype == FP8 or k_scale is not None):
        raise UnsupportedError(
            "index_scores has no gradient through fp8 inputs or k_scale: give it the unquantised "
            "q and k, or call under torch.no_grad()"
        )
    chosen = bound_to(backend) or _choose_indexer(
        "index_scores", q, key_start, key_end, gradient, backend
    )
    key_start, key_end = both_bounds(key_start, key_end, k.shape[1])
    result: Tensor = call(
        score_op, score, gradient, q, k, weights, k_scale, key_start, key_end, causal, chosen
    )
    return result


def index_topk(
    q8: Tensor,
    k8: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    k: int,
    *,
    causal: bool = True,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    deterministic: bool = True,
    backend: str | BoundBackend | None = None,
) -> TopKPlan:
    """Choose the ``k`` best keys of every query by `index_scores`, without holding the scores.

    The choice is exact: higher score first, then lower key; -inf and NaN are never chosen.

    Parameters
    ----------
    q8 : Tensor, (batch, q_len, index_heads, index_dim)
        fp8 e4m3 (whose scale belongs into ``weights``), fp32, bf16 or fp16.
    k8 : Tensor, (batch, k_len, index_dim)
        One key head; q8's dtype.
    k_scale : Tensor, (batch, k_len), float32, or None
        Factors of the keys; required for fp8.
    weights : Tensor, (batch, q_len, index_heads), float32
        May be negative.
    k : int
        Keys to choose; where fewer are seen, the row ends in -1.
    causal : bool
        Query ``i`` sees keys up to ``i + k_len - q_len`` (aligned bottom-right).
    key_start, key_end : Tensor, (batch, q_len), int32, optional
        Query ``i`` sees the keys ``[key_start, key_end)``; either may stand alone.
    deterministic : bool
        False lets a backend break ties at the k-th score in any order, if that is faster.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    TopKPlan
        ``indices`` int32 ``[batch, q_len, 1, k]``, ascending, then -1; shared by all heads.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or arguments do not fit; one sentence with the expected axes.
    UnsupportedError
        If no backend, or not the one asked for, can run the request.

    Notes
    -----
    DeepSeek-V3.2-Exp, equations 1 and 2. Besides inputs and result, at most
    ``LONGCTX_INDEX_BUDGET_MIB`` (512) is held at a time, whatever the lengths. Gradients do not
    flow: train the indexer through `index_scores`.

    Examples
    --------
    >>> import longctx, torch
    >>> q8, _ = longctx.quantize_fp8(torch.randn(1, 100, 4, 64))
    >>> k8, k_scale = longctx.quantize_fp8(torch.randn(1, 100, 64))
    >>> plan = longctx.index_topk(q8, k8, k_scale, torch.rand(1, 100, 4), 16)
    >>> plan.indices.shape, plan.indices[0, 2, 0, :4].tolist()
    (torch.Size([1, 100, 1, 16]), [0, 1, 2, -1])
    """
    if not torch.compiler.is_compiling():
        check_positive("k", k)
        check_once(
            check_index_inputs, q8, k8, weights, k_scale, key_start, key_end, "q8", "k8", False
        )
    chosen = bound_to(backend) or _choose_indexer(
        "index_topk", q8, key_start, key_end, False, backend
    )
    key_start, key_end = both_bounds(key_start, key_end, k8.shape[1])
    indices = call(
        select_op, select, False,
        detached(q8), detached(k8), detached(k_scale), detached(weights),
        key_start, key_end, k, causal, deterministic, chosen,
    )  # fmt: skip
    return TopKPlan(indices.unsqueeze(2))


def _choose_indexer(
    op: str,
    q: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    gradient: bool,
    backend: str | BoundBackend | None,
) -> str:
    features: tuple[str, ...] = ("fp8",) if q.dtype == FP8 else ()
    if key_start is not None or key_end is not None:
        features += ("key-range",)
    return choose(
        op,
        q,
        head_dim=q.shape[3],
        value_dim=q.shape[3],
        q_heads=q.shape[2],
        kv_heads=1,
        features=features,
        gradient=gradient,
        backend=backend,
    )


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TopKPlan,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Softmax attention of every query over the keys that a plan chose for it.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
        bf16, fp16, fp32 or fp64; any strides with a unit last stride.
    k : Tensor, (batch, k_len, kv_heads, head_dim)
        ``q_heads`` is a multiple of ``kv_heads``; heads are never repeated in memory.
    v : Tensor, (batch, k_len, kv_heads, value_dim)
        For absorbed MLA, one KV head of 576 channels and ``v = k[..., :512]``, a view.
    plan : TopKPlan
        Keys, or pages of keys, of each query; unique within a row, -1 anywhere is skipped. Single
        keys may lie after the query; the keys of a page that do are masked.
    scale : float, optional
        Default ``head_dim ** -0.5``; MLA needs ``192 ** -0.5`` times its yarn factor.
    sinks : Tensor, (q_heads,), float32, optional
        Learned logits that enter the softmax denominator alone.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, q_len, q_heads, value_dim)
        In q's dtype. A query without keys gives 0; keys that nobody chose may hold anything.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or arguments do not fit, the plan was made for other shapes, or an index
        is out of range (on a GPU only with ``LONGCTX_CHECK_VALUES=1``; it is skipped otherwise).
    UnsupportedError
        If no backend, or not the one asked for, can run the request; or a gradient is wanted.

    Notes
    -----
    DeepSeek-V3.2-Exp, equation 2; page-wise, Quest (arXiv 2406.10774).

    Examples
    --------
    >>> import longctx, torch
    >>> q, latent = torch.randn(1, 3, 16, 576), torch.randn(1, 50, 1, 576)
    >>> plan = longctx.TopKPlan(torch.tensor([[[[0, 7, -1]], [[3, 5, 8]], [[-1, -1, -1]]]]).int())
    >>> longctx.topk_attention(q, latent, latent[..., :512], plan, scale=192**-0.5).shape
    torch.Size([1, 3, 16, 512])
    """
    return topk_attention_with_lse(q, k, v, plan, scale=scale, sinks=sinks, backend=backend).out


def topk_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TopKPlan,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    backend: str | BoundBackend | None = None,
) -> AttentionOutput:
    """`topk_attention` that also returns the log-sum-exp, for exact merging.

    Parameters are those of `topk_attention`.

    Returns
    -------
    AttentionOutput
        ``out`` and ``lse`` fp32 ``[batch, q_heads, q_len]`` (natural log, sinks included; -inf
        where there was nothing to attend).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not torch.compiler.is_compiling():
        check_once(check_topk_inputs, q, k, v, plan, scale, sinks)
    gradient = needs_gradient(q, k, v, sinks)
    chosen = bound_to(backend) or choose(
        "topk_attention",
        q,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        features=_attention_features(q, v, plan, sinks),
        gradient=gradient,
        backend=backend,
    )
    out, lse = call(
        attend_op, attend, gradient, q, k, v, plan.indices, sinks, plan.page_size, scale, chosen
    )
    return AttentionOutput(out, lse)


def _attention_features(
    q: Tensor, v: Tensor, plan: TopKPlan, sinks: Tensor | None
) -> tuple[str, ...]:
    used: tuple[str, ...] = ("mla",) if v.shape[3] < q.shape[3] else ()
    if sinks is not None:
        used += ("sinks",)
    if plan.page_size > 1:
        used += ("pages",)
    if plan.head_axis == "kv":
        used += ("per-kv-head",)
    return used
