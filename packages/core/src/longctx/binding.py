"""Resolve a kernel once: what models hold instead of dispatching at every call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from longctx.dispatch import BoundBackend, explain, explain_refusal
from longctx.protocols.families import FAMILIES

__all__ = ["bind"]


def bind(
    op: str,
    *,
    backend: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    value_dim: int | None = None,
    q_heads: int = 32,
    kv_heads: int = 8,
    features: tuple[str, ...] = (),
    gradient: bool = False,
) -> Callable[..., Any]:
    """Choose the backend for an op now and return the op with that choice built in.

    Parameters
    ----------
    op : str
        Public function name: an op such as ``"flash_attention"``, or its ``_with_lse`` form.
    backend : str, optional
        A backend asked for by name; it runs or the call raises.
    device, dtype, head_dim, value_dim, q_heads, kv_heads, features, gradient
        The calls that the binding is for, as in `longctx.explain`.

    Returns
    -------
    callable
        The public function with ``backend`` filled in; it checks its inputs but no longer
        dispatches, and it traces under ``torch.compile``.

    Raises
    ------
    BackendNotFoundError
        If the op or the backend is unknown.
    UnsupportedError
        If the request cannot be run; quotes every reason.

    Examples
    --------
    >>> import longctx, torch
    >>> attend = longctx.bind("flash_attention", device="cpu", dtype=torch.float32, head_dim=64)
    >>> q = k = v = torch.randn(1, 16, 2, 64)
    >>> attend(q, k, v, causal=True).shape
    torch.Size([1, 16, 2, 64])
    """
    base = op.removesuffix("_with_lse")
    explanation = explain(
        base,
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        q_heads=q_heads,
        kv_heads=kv_heads,
        features=features,
        gradient=gradient,
        backend=backend,
    )
    if explanation.chosen is None:
        raise explain_refusal(explanation)
    return functools.partial(public_function(op), backend=BoundBackend(explanation.chosen))


def public_function(op: str) -> Callable[..., Any]:
    """Return the public function of an op by name."""
    base = op.removesuffix("_with_lse")
    family = next(name for name, ops in FAMILIES.items() if base in ops)
    function: Callable[..., Any] = getattr(importlib.import_module(f"longctx.ops.{family}"), op)
    return function
