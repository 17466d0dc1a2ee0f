"""Attention under a plan: semantic checks, dispatch and the ``torch.library`` contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.dispatch import BoundBackend, bound_to, choose, primitive
from longctx.ops._checks import (
    check_attention_inputs,
    check_device,
    check_scale,
    values_readable,
)
from longctx.ops._library import call, define, needs_gradient
from longctx.ops._once import check_once
from longctx.plans import BlockPlan, StripePlan, WindowPlan
from longctx.protocols.attention import AttentionOutput

__all__ = ["block_sparse_attention", "block_sparse_attention_with_lse"]

_PLANS = (BlockPlan, StripePlan, WindowPlan)
_HEAD_FEATURES = {"shared": (), "kv": ("per-kv-head",), "query": ("per-query-head",)}


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | StripePlan | WindowPlan,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Softmax attention over the pairs that a plan keeps, in work that follows what it keeps.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
        bf16, fp16, fp32 or fp64; any strides with a unit last stride. Query ``i`` stands at key
        position ``i + k_len - q_len``, so a chunk of a longer prefill is an ordinary call.
    k : Tensor, (batch, k_len, kv_heads, head_dim)
        ``q_heads`` is a multiple of ``kv_heads``; heads are never repeated in memory.
    v : Tensor, (batch, k_len, kv_heads, value_dim)
    plan : BlockPlan, StripePlan or WindowPlan
        What to keep; see `longctx.plans` and, for other plans, `longctx.lowering`.
    causal : bool
        Hide keys behind the query inside the kept blocks. False needs a `BlockPlan`, whose blocks
        are then seen whole; stripes and windows are causal by definition.
    scale : float, optional
        Default ``head_dim ** -0.5``.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, q_len, q_heads, value_dim)
        In q's dtype. A query with nothing to attend gives 0.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or the plan do not fit; one sentence with the expected axes. Indices out
        of range are found where values may be read: on a CPU, or with ``LONGCTX_CHECK_VALUES=1``.
    UnsupportedError
        If no backend, or not the one asked for, can run the request.

    Notes
    -----
    The plans are those of FlexAttention's BlockMask, MInference (arXiv 2407.02490) and
    StreamingLLM (arXiv 2309.17453). No gradient. The torch backend reads counts, stripes and
    ``head_windows`` on the host, which synchronises a GPU.

    Examples
    --------
    >>> import longctx, torch
    >>> q = torch.randn(1, 256, 8, 64)
    >>> k = v = torch.randn(1, 256, 2, 64)
    >>> plan = longctx.WindowPlan(window=32, sink_tokens=4)
    >>> longctx.block_sparse_attention(q, k, v, plan).shape
    torch.Size([1, 256, 8, 64])
    """
    return block_sparse_attention_with_lse(
        q, k, v, plan, causal=causal, scale=scale, backend=backend
    ).out


def block_sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | StripePlan | WindowPlan,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | BoundBackend | None = None,
) -> AttentionOutput:
    """`block_sparse_attention` that also returns the log-sum-exp, for exact merging.

    Parameters are those of `block_sparse_attention`.

    Returns
    -------
    AttentionOutput
        ``out`` and ``lse`` fp32 ``[batch, q_heads, q_len]`` (natural log; -inf where the plan
        keeps nothing; fp64 for fp64 inputs).
    """
    if not isinstance(plan, _PLANS):
        raise TypeError(
            f"plan must be a BlockPlan, StripePlan or WindowPlan, got {type(plan).__name__}: see "
            "longctx.lowering for conversions"
        )
    if not torch.compiler.is_compiling():
        check_once(_check, q, k, v, plan, causal, scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    gradient = needs_gradient(q, k, v)
    chosen = bound_to(backend) or choose(
        "block_sparse_attention",
        q,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        features=_features(plan),
        gradient=gradient,
        backend=backend,
    )
    if isinstance(plan, BlockPlan):
        out, lse = call(
            _block_op, _block, gradient,
            q, k, v, plan.counts, plan.indices, plan.block_q, plan.block_k, causal, scale, chosen,
        )  # fmt: skip
    elif isinstance(plan, StripePlan):
        out, lse = call(
            _stripe_op, _stripe, gradient,
            q, k, v, plan.vertical, plan.vertical_counts, plan.slash, plan.slash_counts, scale,
            chosen,
        )  # fmt: skip
    else:
        out, lse = call(
            _window_op, _window, gradient,
            q, k, v, plan.head_windows, plan.window, plan.sink_tokens, plan.last_queries, scale,
            chosen,
        )  # fmt: skip
    return AttentionOutput(out, lse)


def _features(plan: BlockPlan | StripePlan | WindowPlan) -> tuple[str, ...]:
    if isinstance(plan, WindowPlan):
        return ("window-plan", *(("per-query-head",) if plan.head_windows is not None else ()))
    kind = "block-plan" if isinstance(plan, BlockPlan) else "stripe-plan"
    return (kind, *_HEAD_FEATURES[plan.head_axis])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | StripePlan | WindowPlan,
    causal: bool,
    scale: float | None,
) -> None:
    check_attention_inputs(q, k, v)
    if scale is not None:
        check_scale(scale)
    if not causal and not isinstance(plan, BlockPlan):
        raise ValueError(
            f"a {type(plan).__name__} is causal by definition, got causal=False: use a BlockPlan"
        )
    plan.check(
        batch=q.shape[0],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        q_len=q.shape[1],
        k_len=k.shape[1],
    )
    if isinstance(plan, BlockPlan):
        check_device("q", q, "plan.counts", plan.counts)
        blocks = -(-k.shape[1] // plan.block_k)
        _check_set("BlockPlan.indices", plan.indices, plan.counts, blocks, "key blocks", q)
    elif isinstance(plan, StripePlan):
        for name, what in (("vertical", "keys"), ("slash", "distances")):
            indices, counts = getattr(plan, name), getattr(plan, f"{name}_counts")
            check_device("q", q, f"plan.{name}_counts", counts)
            _check_set(f"StripePlan.{name}", indices, counts, k.shape[1], what, q)
    elif plan.head_windows is not None:
        check_device("q", q, "plan.head_windows", plan.head_windows)
        if values_readable(plan.head_windows) and bool((plan.head_windows < 0).any()):
            raise ValueError(
                f"WindowPlan.head_windows must be at least 0, got {plan.head_windows.tolist()}"
            )


def _check_set(
    name: str, indices: Tensor, counts: Tensor, size: int, what: str, q: Tensor
) -> None:
    """Check sets ``indices [..., C]`` of ``counts [...]`` entries: in range and unique."""
    check_device("q", q, f"plan.{name.partition('.')[2]}", indices)
    if not values_readable(indices) or indices.numel() == 0:
        return
    capacity = indices.shape[-1]
    if bool(((counts < 0) | (counts > capacity)).any()):
        raise ValueError(
            f"{name} has room for {capacity} entries a set, its counts run from "
            f"{int(counts.min())} to {int(counts.max())}"
        )
    real = torch.arange(capacity, device=indices.device) < counts.unsqueeze(-1)
    wrong = real & ((indices < -1) | (indices >= size))
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must be below {size}, the number of {what} (or -1 for none), got "
            f"{int(indices[wrong][0])}"
        )
    ordered = indices.where(real & (indices >= 0), -1).sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError(f"{name} must name each of the {what} once a set, got one twice")


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "block_sparse_forward")(
        q, k, v, counts, indices, block_q=block_q, block_k=block_k, causal=causal, scale=scale
    )
    return result


def _stripe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vertical: Tensor,
    vertical_counts: Tensor,
    slash: Tensor,
    slash_counts: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "stripe_sparse_forward")(
        q, k, v, vertical, vertical_counts, slash, slash_counts, scale=scale
    )
    return result


def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_windows: Tensor | None,
    window: int,
    sink_tokens: int,
    last_queries: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "window_sparse_forward")(
        q,
        k,
        v,
        head_windows,
        window=window,
        sink_tokens=sink_tokens,
        last_queries=last_queries,
        scale=scale,
    )
    return result


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _head_dim = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, q_len, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, q_len, dtype=lse_dtype, device=q.device)


_QKV = "Tensor q, Tensor k, Tensor v"
_block_op = define(
    "block_sparse_forward",
    f"({_QKV}, Tensor counts, Tensor indices, SymInt block_q, SymInt block_k, bool causal, "
    "float scale, str backend) -> (Tensor, Tensor)",
    _block,
    _fake,
)
_stripe_op = define(
    "stripe_sparse_forward",
    f"({_QKV}, Tensor vertical, Tensor vertical_counts, Tensor slash, Tensor slash_counts, "
    "float scale, str backend) -> (Tensor, Tensor)",
    _stripe,
    _fake,
)
_window_op = define(
    "window_sparse_forward",
    f"({_QKV}, Tensor? head_windows, SymInt window, SymInt sink_tokens, SymInt last_queries, "
    "float scale, str backend) -> (Tensor, Tensor)",
    _window,
    _fake,
)
