"""The ``torch.library`` contract of the DSA family; `longctx.ops.dsa` is its public side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.dispatch import primitive
from longctx.ops._library import define

__all__ = [
    "attend",
    "attend_op",
    "quantize",
    "quantize_op",
    "score",
    "score_op",
    "select",
    "select_op",
]


def quantize(x: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor]:
    """Run the quantiser of a backend."""
    result: tuple[Tensor, Tensor] = primitive(backend, "quantize_forward")(
        x, scale_format=scale_format
    )
    return result


def _quantize_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def score(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    causal: bool,
    backend: str,
) -> Tensor:
    """Run the indexer of a backend."""
    result: Tensor = primitive(backend, "index_scores_forward")(
        q,
        k,
        weights,
        k_scale=k_scale,
        causal=causal,
        key_start=key_start,
        key_end=key_end,
    )
    return result


def _score_fake(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=dtype, device=q.device)


def _score_backward(
    dscores: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = primitive(backend, "index_scores_backward")(
        dscores, q, k, weights, causal=causal, key_start=key_start, key_end=key_end
    )
    return result


def _score_backward_fake(
    dscores: Tensor, q: Tensor, k: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dweights = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, weights)
    )
    return dq, dk, dweights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, weights, _k_scale, key_start, key_end, *options = inputs
    ctx.save_for_backward(q, k, weights, key_start, key_end)
    ctx.options = options


def _autograd(ctx: Any, dscores: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _score_backward_op(dscores.contiguous(), *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * 5


def select(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    top_k: int,
    causal: bool,
    deterministic: bool,
    backend: str,
) -> Tensor:
    """Run the top-k selection of a backend."""
    result: Tensor = primitive(backend, "index_topk_forward")(
        q,
        k,
        k_scale,
        weights,
        top_k,
        causal=causal,
        key_start=key_start,
        key_end=key_end,
        deterministic=deterministic,
    )
    return result


def _select_fake(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    top_k: int,
    *_: Any,
) -> Tensor:
    return torch.empty(q.shape[0], q.shape[1], top_k, dtype=torch.int32, device=q.device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sinks: Tensor | None,
    page_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run the attention over chosen keys of a backend."""
    result: tuple[Tensor, Tensor] = primitive(backend, "topk_attention_forward")(
        q, k, v, indices, page_size=page_size, scale=scale, sinks=sinks
    )
    return result


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _head_dim = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, q_len, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, q_len, dtype=lse_dtype, device=q.device)


quantize_op = define(
    "quantize_forward",
    "(Tensor x, str scale_format, str backend) -> (Tensor, Tensor)",
    quantize,
    _quantize_fake,
)
_score_backward_op = define(
    "index_scores_backward",
    "(Tensor dscores, Tensor q, Tensor k, Tensor weights, Tensor? key_start, Tensor? key_end, "
    "bool causal, str backend) -> (Tensor, Tensor, Tensor)",
    _score_backward,
    _score_backward_fake,
)
score_op = define(
    "index_scores_forward",
    "(Tensor q, Tensor k, Tensor weights, Tensor? k_scale, Tensor? key_start, Tensor? key_end, "
    "bool causal, str backend) -> Tensor",
    score,
    _score_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
select_op = define(
    "index_topk_forward",
    "(Tensor q, Tensor k, Tensor? k_scale, Tensor weights, Tensor? key_start, Tensor? key_end, "
    "SymInt top_k, bool causal, bool deterministic, str backend) -> Tensor",
    select,
    _select_fake,
)
attend_op = define(
    "topk_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? sinks, SymInt page_size, float scale, "
    "str backend) -> (Tensor, Tensor)",
    attend,
    _attend_fake,
)
