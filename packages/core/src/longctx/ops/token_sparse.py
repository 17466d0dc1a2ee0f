"""Token Sparse Attention: score the tokens, choose a set a head, attend inside the sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx._compact import (
    gather_tokens,
    occupied_width,
    restore_rows,
    rows_of_slots,
    valid_slots,
)
from longctx.dispatch import BoundBackend, bound_to, choose
from longctx.ops._library import call, detached, needs_gradient
from longctx.ops._once import check_once
from longctx.ops._token_sparse_checks import (
    check_score_inputs,
    check_select_inputs,
    check_token_set_inputs,
)
from longctx.ops._token_sparse_library import (
    attend,
    attend_op,
    score,
    score_op,
    select,
    select_op,
)
from longctx.ops.block_sparse import block_sparse_attention_with_lse
from longctx.plans import HeadAxis, StripePlan, TokenSetPlan
from longctx.protocols.attention import AttentionOutput

__all__ = [
    "select_tokens",
    "token_scores",
    "token_sparse_attention",
    "token_sparse_attention_with_lse",
]

_HEAD_FEATURES: dict[HeadAxis, tuple[str, ...]] = {
    "shared": (),
    "kv": ("per-kv-head",),
    "query": ("per-query-head",),
}


def token_scores(
    q_recent: Tensor,
    k: Tensor,
    *,
    pool: int = 7,
    scale: float | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Score the tokens before a window of recent queries by the attention that they get from it.

    The mean over the queries of their causal softmax over all keys, then averaged over ``pool``
    neighbours (zeros beyond both ends count).

    Parameters
    ----------
    q_recent : Tensor, (batch, window, q_heads, head_dim)
        The last ``window`` queries; bf16, fp16, fp32 or fp64.
    k : Tensor, (batch, k_len, kv_heads, head_dim)
        All keys, those of the window included; never repeated over query heads.
    pool : int
        Odd; 1 is off.
    scale : float, optional
        Default ``head_dim ** -0.5``.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, q_heads, k_len - window), float32
        float64 for fp64 inputs.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or arguments do not fit; one sentence with the expected axes.
    UnsupportedError
        If no backend, or not the one asked for, can run the request; or a gradient is wanted.

    Notes
    -----
    Token Sparse Attention, arXiv 2602.03216, algorithm 1; the mean over the window as in the
    authors' code.

    Examples
    --------
    >>> import longctx, torch
    >>> q, k = torch.randn(1, 200, 8, 64), torch.randn(1, 200, 2, 64)
    >>> longctx.token_scores(q[:, -32:], k).shape
    torch.Size([1, 8, 168])
    """
    scale = q_recent.shape[-1] ** -0.5 if scale is None else scale
    if not torch.compiler.is_compiling():
        check_once(check_score_inputs, q_recent, k, pool, scale)
    gradient = needs_gradient(q_recent, k)
    chosen = bound_to(backend) or choose(
        "token_scores",
        q_recent,
        head_dim=q_recent.shape[3],
        value_dim=q_recent.shape[3],
        q_heads=q_recent.shape[2],
        kv_heads=k.shape[2],
        gradient=gradient,
        backend=backend,
    )
    result: Tensor = call(score_op, score, gradient, q_recent, k, pool, scale, chosen)
    return result


def select_tokens(
    scores: Tensor,
    *,
    drop_mass: float,
    min_tokens: int = 1024,
    recent: int = 128,
    head_axis: HeadAxis = "query",
    backend: str | BoundBackend | None = None,
) -> TokenSetPlan:
    """Choose the tokens that a layer keeps: one length for all heads, one set a head.

    With ``g`` the mean of the scores over heads, normalised, the smallest entries go until they
    hold at least ``drop_mass`` together; every head keeps its own best ``max(min_tokens, rest)``,
    and the ``recent`` tokens behind the prefix.

    Parameters
    ----------
    scores : Tensor, (batch, heads, prefix_len), float32 or float64
        `token_scores`, at least 0.
    drop_mass : float
        Share of the score that may go, 0 to 1; 0 keeps everything. The paper's tau: 0.005 for
        Llama-3.1-8B.
    min_tokens : int
        Tokens of the prefix that stay in any case; a shorter prefix stays whole.
    recent : int
        Tokens behind the prefix, always kept: the window that `token_scores` was given.
    head_axis : {"query", "kv", "shared"}
        What the heads of ``scores`` are. Sets a KV head keep GQA's sharing, but are no longer the
        published method.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    TokenSetPlan
        ``indices`` int32 ``[batch, heads, prefix_len + recent]``, ascending, then -1, and
        ``counts`` on the scores' device, equal for all heads of a batch entry. Ties: higher score
        first, then lower token. Nothing is read on the host.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or arguments do not fit, or (where they can be read) scores are negative
        or not finite.
    UnsupportedError
        If no backend, or not the one asked for, can run the request.

    Notes
    -----
    Token Sparse Attention, arXiv 2602.03216, algorithm 1 (Dynamic Token Coverage).

    Examples
    --------
    >>> import longctx, torch
    >>> scores = torch.tensor([[[8.0, 1.0, 1.0, 6.0]]])
    >>> plan = longctx.select_tokens(scores, drop_mass=0.1, min_tokens=0, recent=2)
    >>> plan.indices.tolist(), plan.counts.tolist()
    ([[[0, 3, 4, 5, -1, -1]]], [[4]])
    """
    if not torch.compiler.is_compiling():
        check_once(check_select_inputs, scores, drop_mass, min_tokens, recent, head_axis)
    chosen = bound_to(backend) or choose(
        "select_tokens",
        scores,
        head_dim=1,
        value_dim=1,
        q_heads=scores.shape[1],
        kv_heads=scores.shape[1],
        backend=backend,
    )
    indices, counts = call(
        select_op, select, False, detached(scores), float(drop_mass), min_tokens, recent, chosen
    )
    return TokenSetPlan(indices, counts, head_axis)


def token_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TokenSetPlan,
    *,
    scale: float | None = None,
    inner: Callable[..., Any] | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Causal attention among the tokens of each head's set; the other rows are 0.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
        The queries of the last ``q_len`` of ``k_len`` tokens (chunked prefill); bf16, fp16, fp32
        or fp64; any strides with a unit last stride.
    k : Tensor, (batch, k_len, kv_heads, head_dim)
        ``q_heads`` is a multiple of ``kv_heads``.
    v : Tensor, (batch, k_len, kv_heads, value_dim)
    plan : TokenSetPlan
        Positions of the tokens, ascending. With scope ``"kv"`` every query attends the set, and
        the call runs as `block_sparse_attention` of a `StripePlan` whose columns are the set.
    scale : float, optional
        Default ``head_dim ** -0.5``.
    inner : callable, optional
        ``inner(q, k, v) -> out``: the attention to run on the compact tensors ``[batch, tokens,
        heads, dim]`` instead of the backend's, causal and aligned bottom-right. Sets a query head
        bring one KV head a query head; heads with fewer tokens end in zeros. With ``inner`` the
        largest count is read on the host (not while compiling or capturing: the tensors then have
        the plan's capacity), and gradients flow as far as ``inner`` lets them.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`. The torch backend reads the
        largest count on the host.

    Returns
    -------
    Tensor, (batch, q_len, q_heads, value_dim)
        In q's dtype.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or arguments do not fit, or the plan was made for other shapes.
    UnsupportedError
        If no backend, or not the one asked for, can run the request; or a gradient is wanted.

    Notes
    -----
    Token Sparse Attention, arXiv 2602.03216: ``out_i = softmax_j(scale q_i . k_j) v_j`` over
    ``j <= i`` in the set, for ``i`` in the set.

    Examples
    --------
    >>> import longctx, torch
    >>> q, k, v = (
    ...     torch.randn(1, 200, 8, 64),
    ...     torch.randn(1, 200, 2, 64),
    ...     torch.randn(1, 200, 2, 64),
    ... )
    >>> scores = longctx.token_scores(q[:, -32:], k)
    >>> plan = longctx.select_tokens(scores, drop_mass=0.5, min_tokens=16, recent=32)
    >>> longctx.token_sparse_attention(q, k, v, plan).shape
    torch.Size([1, 200, 8, 64])
    """
    _check(q, k, v, plan, scale, inner, backend)
    if inner is not None:
        return _run_inner(q, k, v, plan, lambda *t: (inner(*t), None))[0]
    return _dispatch(q, k, v, plan, scale, backend).out


def token_sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TokenSetPlan,
    *,
    scale: float | None = None,
    inner: Callable[..., Any] | None = None,
    backend: str | BoundBackend | None = None,
) -> AttentionOutput:
    """`token_sparse_attention` that also returns the log-sum-exp, for exact merging.

    Parameters are those of `token_sparse_attention`, except that ``inner`` returns ``(out, lse)``.

    Returns
    -------
    AttentionOutput
        ``out`` and ``lse`` fp32 ``[batch, q_heads, q_len]`` (natural log; -inf in rows that are
        not in the set).
    """
    _check(q, k, v, plan, scale, inner, backend)
    if inner is None:
        return _dispatch(q, k, v, plan, scale, backend)
    out, lse = _run_inner(q, k, v, plan, inner)
    if lse is None:
        raise TypeError("inner must return (out, lse) here, got no lse")
    return AttentionOutput(out, lse)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TokenSetPlan,
    scale: float | None,
    inner: Callable[..., Any] | None,
    backend: str | BoundBackend | None,
) -> None:
    if not torch.compiler.is_compiling():
        check_once(check_token_set_inputs, q, k, v, plan, 1.0 if scale is None else scale)
    if inner is None:
        return
    for name, value in (("scale", scale), ("backend", backend)):
        if value is not None:
            raise ValueError(
                f"{name} is for the backend's own attention: give it to inner instead"
            )
    if plan.scope != "qkv":
        raise ValueError(
            f"inner needs a plan of scope 'qkv', got {plan.scope!r}: only that gathers queries"
        )


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TokenSetPlan,
    scale: float | None,
    backend: str | BoundBackend | None,
) -> AttentionOutput:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if plan.scope == "kv":
        return _attend_columns(q, k, v, plan, scale, backend)
    gradient = needs_gradient(q, k, v)
    chosen = bound_to(backend) or choose(
        "token_sparse_attention",
        q,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        features=_HEAD_FEATURES[plan.head_axis] + (("mla",) if v.shape[3] < q.shape[3] else ()),
        gradient=gradient,
        backend=backend,
    )
    out, lse = call(attend_op, attend, gradient, q, k, v, plan.indices, plan.counts, scale, chosen)
    return AttentionOutput(out, lse)


def _attend_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TokenSetPlan,
    scale: float,
    backend: str | BoundBackend | None,
) -> AttentionOutput:
    """Attend a set that restricts the keys alone: a stripe plan of columns without diagonals."""
    none = torch.full_like(plan.indices[..., :1], -1)
    columns = StripePlan(
        plan.indices, plan.counts, none, torch.zeros_like(plan.counts), plan.head_axis
    )
    return block_sparse_attention_with_lse(q, k, v, columns, scale=scale, backend=backend)


def _run_inner(
    q: Tensor, k: Tensor, v: Tensor, plan: TokenSetPlan, inner: Callable[..., Any]
) -> tuple[Tensor, Tensor | None]:
    q_len, q_heads = q.shape[1], q.shape[2]
    first_position = k.shape[1] - q_len
    kv_heads = q_heads if plan.head_axis == "query" else k.shape[2]
    width, start = occupied_width(plan.indices, plan.counts, first_position)
    slots = valid_slots(plan.indices, plan.counts)[..., :width]
    rows = slots[..., start:] - first_position
    rows = rows.where(rows >= 0, -1)
    if rows.shape[2] == 0:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return out, q.new_full((q.shape[0], q_heads, q_len), -torch.inf, dtype=lse_dtype)
    out, lse = inner(
        gather_tokens(q, rows, q_heads),
        gather_tokens(k, slots, kv_heads),
        gather_tokens(v, slots, kv_heads),
    )
    expected = (q.shape[0], rows.shape[2], q_heads, v.shape[3])
    if tuple(out.shape) != expected:
        raise ValueError(
            "inner must return (batch, tokens, q_heads, value_dim) = "
            f"{expected}, got {tuple(out.shape)}"
        )
    inverse = rows_of_slots(rows, q_len)
    out = restore_rows(out, inverse, 0.0)
    if lse is not None:
        lse = restore_rows(lse.transpose(1, 2).unsqueeze(3), inverse, -torch.inf)
        lse = lse.squeeze(3).transpose(1, 2).contiguous()
    return out, lse
