"""Exact softmax attention: semantic checks, dispatch and the ``torch.library`` contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.dispatch import BoundBackend, bound_to, choose, primitive
from longctx.errors import UnsupportedError
from longctx.ops._checks import (
    check_attention_inputs,
    check_axes,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_same,
    check_scale,
    check_sinks,
    check_softcap,
    check_window,
    values_readable,
)
from longctx.ops._library import call, define, needs_gradient
from longctx.protocols.attention import AttentionOutput

__all__ = ["flash_attention", "flash_attention_with_lse"]

FP8 = torch.float8_e4m3fn


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Exact softmax attention, ``softmax(scale q k^T) v``, without the score matrix in memory.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
        bf16, fp16, fp32, fp64 or fp8 e4m3; any strides with a unit last stride.
    k : Tensor, (batch, k_len, kv_heads, head_dim)
        ``q_heads`` is a multiple of ``kv_heads`` (GQA, MQA); heads are never repeated in memory.
    v : Tensor, (batch, k_len, kv_heads, value_dim)
    causal : bool
        Query ``i`` sees keys up to ``i + k_len - q_len`` (aligned bottom-right).
    window : (left, right), optional
        Inclusive distances around the query's position; None is unlimited.
    softcap : float
        ``c``: scores become ``c tanh(s / c)``; 0 is off.
    sinks : Tensor, (q_heads,), float32, optional
        Learned logits that enter the softmax denominator alone (gpt-oss).
    scale : float, optional
        Default ``head_dim ** -0.5``.
    cu_seqlens_q, cu_seqlens_k : Tensor, (sequences + 1,), int32, optional
        Cumulative lengths of packed sequences; the batch is then 1. The second defaults to the
        first. The torch backend reads them on the host, which synchronises a GPU, except for a
        bf16 or fp16 forward without softcap.
    q_descale, k_descale, v_descale : Tensor, (batch, kv_heads), float32, optional
        Factors of fp8 inputs, at least 0.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, q_len, q_heads, value_dim)
        In q's dtype (bfloat16 for fp8). A query with nothing to attend gives 0.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or arguments do not fit; one sentence with the expected axes.
    UnsupportedError
        If no backend, or not the one asked for, can run the request.

    Notes
    -----
    Dao, FlashAttention-2, arXiv 2307.08691. Differentiable in q, k, v and sinks, also through lse.

    Examples
    --------
    >>> import longctx, torch
    >>> q = torch.randn(1, 5, 8, 64)
    >>> k = v = torch.randn(1, 9, 2, 64)
    >>> longctx.flash_attention(q, k, v, causal=True).shape
    torch.Size([1, 5, 8, 64])
    """
    return flash_attention_with_lse(
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        backend=backend,
    ).out


def flash_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    backend: str | BoundBackend | None = None,
) -> AttentionOutput:
    """`flash_attention` that also returns the log-sum-exp, for exact merging.

    Parameters are those of `flash_attention`.

    Returns
    -------
    AttentionOutput
        ``out`` and ``lse`` fp32 ``[batch, q_heads, q_len]`` (natural log, sinks included; -inf
        where there was nothing to attend; fp64 for fp64 inputs).
    """
    left, right = check_window(window)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if not torch.compiler.is_compiling():
        # as cheap as looking up whether inputs like these passed before
        _check(q, k, v, sinks, scale, softcap, cu_seqlens_q, cu_seqlens_k)
        if not (q_descale is k_descale is v_descale is None):
            for name, descale in (("q", q_descale), ("k", k_descale), ("v", v_descale)):
                _check_descale(name, descale, q, k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    gradient = needs_gradient(q, k, v, sinks)
    if gradient and q.dtype == FP8:
        raise UnsupportedError(
            "flash_attention has no gradient for fp8 inputs: call under torch.no_grad() or in bf16"
        )
    chosen = bound_to(backend) or choose(
        "flash_attention",
        q,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        features=_features(left, right, softcap, sinks, cu_seqlens_q, q.dtype),
        gradient=gradient,
        backend=backend,
    )
    out, lse = call(
        _forward_op, _forward, gradient,
        q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, q_descale, k_descale, v_descale,
        causal, left, right, softcap, scale, chosen,
    )  # fmt: skip
    return AttentionOutput(out, lse)


def _features(
    left: int | None,
    right: int | None,
    softcap: float,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> tuple[str, ...]:
    used: tuple[str, ...] = ()
    if left is not None or right is not None:
        used += ("window",)
    if softcap > 0:
        used += ("softcap",)
    if sinks is not None:
        used += ("sinks",)
    if cu_seqlens is not None:
        used += ("varlen",)
    if dtype == FP8:
        used += ("fp8",)
    return used


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    check_attention_inputs(q, k, v)
    if scale is not None:
        check_scale(scale)
    check_softcap(softcap)
    if sinks is not None:
        check_sinks(sinks, q, q.shape[2])
    if cu_seqlens_k is not None:
        if cu_seqlens_q is None:
            raise ValueError("cu_seqlens_k was given without cu_seqlens_q: give both")
        for name, ends, tensor in (
            ("cu_seqlens_q", cu_seqlens_q, q),
            ("cu_seqlens_k", cu_seqlens_k, k),
        ):
            check_cu_seqlens(name, ends, tensor.shape[0], tensor.shape[1])
            check_device("q", q, name, ends)
        check_same(
            "number of sequences",
            "cu_seqlens_q",
            cu_seqlens_q.shape[0] - 1,
            "cu_seqlens_k",
            cu_seqlens_k.shape[0] - 1,
        )


def _check_descale(name: str, descale: Tensor | None, q: Tensor, k: Tensor) -> None:
    if descale is None:
        return
    if q.dtype != FP8:
        raise TypeError(f"{name}_descale is for fp8 e4m3 inputs, q is {q.dtype}: leave it out")
    check_axes(f"{name}_descale", descale, "batch, kv_heads")
    check_dtype(f"{name}_descale", descale, torch.float32)
    check_device("q", q, f"{name}_descale", descale)
    expected = (k.shape[0], k.shape[2])
    check_same("shape", f"{name}_descale", tuple(descale.shape), "(batch, kv_heads)", expected)
    if values_readable(descale) and bool((descale < 0).any()):
        least = descale.min().item()
        raise ValueError(f"{name}_descale must be at least 0, got {least:g}: negate {name}")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "flash_forward")(
        q, k, v, causal=causal, window_left=window_left, window_right=window_right,
        softcap=softcap, sinks=sinks, scale=scale,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    return result


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _head_dim = q.shape
    dtype = torch.bfloat16 if q.dtype == FP8 else q.dtype
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, q_len, heads, v.shape[3], dtype=dtype, device=q.device)
    return out, torch.empty(batch, heads, q_len, dtype=lse_dtype, device=q.device)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dsinks = primitive(backend, "flash_backward")(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    # a torch.library schema has a fixed number of outputs: no sinks, an empty gradient
    return dq, dk, dv, q.new_empty(0, dtype=lse.dtype) if dsinks is None else dsinks


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return (
        like(q),
        like(k),
        like(v),
        q.new_empty(0, dtype=lse.dtype) if sinks is None else like(sinks),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, _qd, _kd, _vd, *options = inputs
    ctx.set_materialize_grads(False)  # an unused lse then has no gradient, not one of zeros
    ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options


def _autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    if dout.stride(-1) != 1:  # such as the gradient of a sum: backends rely on a unit last stride
        dout = dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dsinks = _backward_op(
        dout, dlse, q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return dq, dk, dv, dsinks if sinks is not None else None, *(None,) * 11


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "flash_attention can be differentiated once: the gradient of its gradient is not available"
    )


_OPTIONS = (
    "bool causal, SymInt? window_left, SymInt? window_right, float softcap, float scale, "
    "str backend"
)
_backward_op = define(
    "flash_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=_no_second_derivative,
)
_forward_op = define(
    "flash_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    f"Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
