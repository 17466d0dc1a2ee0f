"""Registration with ``torch.library``: schema, fake, gradient, the backend as an argument.

Registered ops (``torch.ops.longctx.*``) are what traces, gradients and opcheck see. Eager calls
that need no gradient go straight to the backend's primitive and skip the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["call", "define", "detached", "needs_gradient"]

_LIBRARY = torch.library.Library("longctx", "DEF")  # type: ignore[no-untyped-call]


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``longctx::name`` and return its callable overload.

    Parameters
    ----------
    name : str
        Op name inside the ``longctx`` namespace.
    schema : str
        Argument and return types; by convention the last argument is ``str backend``.
    run : callable
        Implementation for real tensors on any device; may not return aliases of its inputs.
    fake : callable
        Shapes, strides and dtypes for meta tensors; touches no data.
    setup_context, backward : callable, optional
        The gradient, as in `torch.library.register_autograd`.

    Returns
    -------
    callable
        The op's default overload.
    """
    _LIBRARY.define(  # type: ignore[no-untyped-call]
        f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,)
    )
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"longctx::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"longctx::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    overload: Callable[..., Any] = getattr(torch.ops.longctx, name).default
    return overload


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd records and one of the tensors asks for a gradient."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def detached(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor without its gradient: itself where it has none."""
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def call(
    registered: Callable[..., Any], run: Callable[..., Any], gradient: bool, *args: Any
) -> Any:
    """Call the registered op where tracing or gradients need it, its implementation otherwise."""
    if gradient or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return registered(*args)
    return run(*args)
