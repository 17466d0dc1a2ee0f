"""Lightning attention: semantic checks, dispatch and the ``torch.library`` contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.dispatch import BoundBackend, bound_to, choose, primitive
from longctx.ops._checks import (
    check_axes,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_same,
    check_scale,
    values_readable,
)
from longctx.ops._library import call, define, needs_gradient
from longctx.ops._once import check_once
from longctx.protocols.attention import LightningOutput

__all__ = ["lightning_attention", "lightning_decode"]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | BoundBackend | None = None,
) -> LightningOutput:
    """Linear attention with one fixed decay a head, in time linear in the length.

    ``S_t = exp(log_decay) S_{t-1} + k_t^T v_t`` and ``o_t = scale q_t S_t``: causal, without
    softmax and without a denominator; models put a norm behind it.

    Parameters
    ----------
    q, k : Tensor, (batch, seq, heads, head_dim)
        bf16, fp16, fp32 or fp64; any strides with a unit last stride, such as views of one fused
        projection. There are as many query as key heads.
    v : Tensor, (batch, seq, heads, value_dim)
    log_decay : Tensor, (heads,), float32
        Minus the slope of each head: at most 0 (0 forgets nothing). A constant, without gradient.
    scale : float
        Factor of the output; 1.0 as in the paper (Ring-linear takes ``head_dim ** -0.5``).
    initial_state : Tensor, (sequences, heads, head_dim, value_dim), float32, optional
        State before the first token, such as the ``final_state`` of an earlier chunk; default
        zeros. ``sequences`` is the batch, or the number of packed sequences.
    cu_seqlens : Tensor, (sequences + 1,), int32, optional
        Cumulative lengths of packed sequences; the batch is then 1. The torch backend reads them
        on the host, which synchronises a GPU.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    LightningOutput
        ``out`` ``[batch, seq, heads, value_dim]`` in q's dtype, and ``final_state`` fp32
        ``[sequences, heads, head_dim, value_dim]`` as of after each sequence's last token (an
        empty sequence hands its initial state on); fp64 for fp64 inputs.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or arguments do not fit; one sentence with the expected axes.
    UnsupportedError
        If no backend, or not the one asked for, can run the request.

    Notes
    -----
    Qin et al., Lightning Attention-2, arXiv 2401.04658, algorithms 1 and 2. Differentiable in q,
    k, v and initial_state, also through final_state. Prefilling in chunks, each from the last
    one's final_state, gives what one call gives.

    Examples
    --------
    >>> import longctx, torch
    >>> q = k = v = torch.randn(1, 300, 4, 64)
    >>> log_decay = -torch.tensor([0.5, 0.25, 0.125, 0.0])
    >>> out, state = longctx.lightning_attention(q, k, v, log_decay)
    >>> out.shape, state.shape
    (torch.Size([1, 300, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    if not torch.compiler.is_compiling():
        check_once(_check_attention, q, k, v, log_decay, scale, initial_state, cu_seqlens)
    used = (("initial-state", initial_state is not None), ("varlen", cu_seqlens is not None))
    gradient = needs_gradient(q, k, v, initial_state)
    chosen = bound_to(backend) or choose(
        "lightning_attention",
        q,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        features=tuple(name for name, on in used if on),
        gradient=gradient,
        backend=backend,
    )
    tensors = (q, k, v, log_decay, initial_state, cu_seqlens)
    return LightningOutput(*call(_forward_op, _forward, gradient, *tensors, scale, chosen))


def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """One token of lightning attention; ``state`` is updated in place.

    Parameters
    ----------
    q, k : Tensor, (batch, 1, heads, head_dim)
        bf16, fp16, fp32 or fp64 (then with an fp64 state); any strides with a unit last stride.
    v : Tensor, (batch, 1, heads, value_dim)
    state : Tensor, (batch, heads, head_dim, value_dim), float32
        State before this token, such as the ``final_state`` of `lightning_attention`; overwritten
        with the state after it.
    log_decay : Tensor, (heads,), float32
        As in `lightning_attention`.
    scale : float
        Factor of the output.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, 1, heads, value_dim)
        In q's dtype.

    Raises
    ------
    ValueError, TypeError, UnsupportedError
        As in `lightning_attention`.

    Notes
    -----
    The recurrence of arXiv 2401.04658, equations 3 to 5. No gradient.

    Examples
    --------
    >>> import longctx, torch
    >>> q = k = v = torch.randn(2, 1, 4, 64)
    >>> state = torch.zeros(2, 4, 64, 64)
    >>> longctx.lightning_decode(q, k, v, state, -torch.ones(4)).shape
    torch.Size([2, 1, 4, 64])
    """
    if not torch.compiler.is_compiling():
        check_once(_check_decode, q, k, v, state, log_decay, scale)
    gradient = needs_gradient(q, k, v, state)
    chosen = bound_to(backend) or choose(
        "lightning_decode",
        q,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        gradient=gradient,
        backend=backend,
    )
    out: Tensor = call(_decode_op, _decode, gradient, q, k, v, state, log_decay, scale, chosen)
    return out


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> None:
    check_axes("q", q, "batch, seq, heads, head_dim")
    check_axes("k", k, "batch, seq, heads, head_dim")
    check_axes("v", v, "batch, seq, heads, value_dim")
    for name, other in (("k", k), ("v", v)):
        check_device("q", q, name, other)
        if other.dtype != q.dtype:
            raise TypeError(
                f"q and {name} must share a dtype, got {q.dtype} and {other.dtype}: cast one"
            )
        for axis, what in enumerate(("batch", "seq", "heads")):
            check_same(what, "q", q.shape[axis], name, other.shape[axis])
    check_same("head_dim", "q", q.shape[3], "k", k.shape[3])
    check_scale(scale)
    check_axes("log_decay", log_decay, "heads")
    check_device("q", q, "log_decay", log_decay)
    if log_decay.dtype != _state_dtype(q):
        check_dtype("log_decay", log_decay, torch.float32)
    check_same("heads", "q", q.shape[2], "log_decay", log_decay.shape[0])
    if log_decay.requires_grad:
        raise ValueError("log_decay is a constant without gradient: pass log_decay.detach()")
    if values_readable(log_decay) and not bool(
        ((log_decay <= 0) & (log_decay > -torch.inf)).all()
    ):
        raise ValueError(
            f"log_decay must be finite and at most 0 (minus the slope), got {log_decay.tolist()}"
        )


def _check_state(name: str, state: Tensor, q: Tensor, v: Tensor, rows: int) -> None:
    check_axes(name, state, "sequences, heads, head_dim, value_dim")
    check_device("q", q, name, state)
    check_dtype(name, state, _state_dtype(q))
    expected = (rows, q.shape[2], q.shape[3], v.shape[3])
    if tuple(state.shape) != expected:
        raise ValueError(
            f"{name} must be (sequences, heads, head_dim, value_dim) = {expected}, "
            f"got {tuple(state.shape)}"
        )


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _check_inputs(q, k, v, log_decay, scale)
    rows = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0], q.shape[1])
        check_device("q", q, "cu_seqlens", cu_seqlens)
        rows = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, q, v, rows)


def _check_decode(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, scale: float
) -> None:
    _check_inputs(q, k, v, log_decay, scale)
    if q.shape[1] != 1:
        raise ValueError(
            f"lightning_decode takes one token, got seq={q.shape[1]}: use lightning_attention "
            "with initial_state"
        )
    _check_state("state", state, q, v, q.shape[0])
    if any(size > 1 and step == 0 for size, step in zip(state.shape, state.stride(), strict=True)):
        raise ValueError("state is written in place, got an expanded tensor: call .contiguous()")


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "lightning_forward")(
        q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    return result


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    return out, _state_fake(q, v, cu_seqlens)


def _state_fake(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, q.shape[2], q.shape[3], v.shape[3])
    return torch.empty(shape, dtype=_state_dtype(q), device=q.device)


def _backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor, Tensor] = primitive(backend, "lightning_backward")(
        dout,
        dfinal_state,
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return result


def _backward_fake(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv, _state_fake(q, v, cu_seqlens)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, backend
    ctx.set_materialize_grads(False)  # an unused final_state has no gradient, not one of zeros


def _autograd(
    ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, _k, v, _log_decay, initial_state, _cu_seqlens = ctx.saved_tensors
    if dout is None:
        dout = q.new_zeros(*q.shape[:3], v.shape[3])
    elif dout.stride(-1) != 1:  # such as the gradient of a sum: backends rely on a unit stride
        dout = dout.contiguous()
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    dq, dk, dv, dinitial = _backward_op(dout, dfinal_state, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, None if initial_state is None else dinitial, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("lightning_attention can be differentiated once: its gradient has none")


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    out: Tensor = primitive(backend, "lightning_decode_forward")(
        q, k, v, state, log_decay, scale=scale
    )
    return out


def _decode_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? initial_state, Tensor? cu_seqlens"
)
_backward_op = define(
    "lightning_backward",
    f"(Tensor dout, Tensor? dfinal_state, {_TENSORS}, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=_no_second_derivative,
)
_forward_op = define(
    "lightning_forward",
    f"({_TENSORS}, float scale, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_decode_op = define(
    "lightning_decode",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor log_decay, float scale, str backend) "
    "-> Tensor",
    _decode,
    _decode_fake,
)
