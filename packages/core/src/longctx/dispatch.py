"""Which backend runs a call: argument, then `use`, then ``LONGCTX_BACKEND``, then priority.

A backend asked for by name never falls back. The choice reads static properties only (device,
dtype, sizes, features), so that it is a constant under ``torch.compile``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from longctx.errors import BackendNotFoundError, UnsupportedError, nearest_name
from longctx.explanation import Candidate, Explanation
from longctx.plugins import on_reset, registry
from longctx.protocols.backend import Backend
from longctx.protocols.families import OPS
from longctx.support import OpRequest, Reason, ReasonCode, reasons_against

__all__ = ["BoundBackend", "bound_to", "choose", "explain", "use"]

log = logging.getLogger("longctx")

_in_use: ContextVar[str | None] = ContextVar("longctx_backend", default=None)

KNOWN_BACKENDS = {
    "triton": "pip install longctx-backend-triton",
    "cupy": "pip install 'longctx-backend-cupy[cuda13]'",
    "numba": "pip install 'longctx-backend-numba[cuda13]'",
}
"""Install hints for backends that exist but may not be installed."""


@dataclass(frozen=True, slots=True)
class BoundBackend:
    """A backend that was chosen once; ops given one skip dispatch."""

    name: str


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run the ops of a ``with`` block on one backend, without falling back.

    Parameters
    ----------
    backend : str
        Name of an installed backend.

    Raises
    ------
    BackendNotFoundError
        If no backend has that name.

    Examples
    --------
    >>> import longctx, torch
    >>> q = k = v = torch.randn(1, 16, 2, 64)
    >>> with longctx.use("torch"):
    ...     longctx.flash_attention(q, k, v, causal=True).shape
    torch.Size([1, 16, 2, 64])
    """
    token = _in_use.set(_known(backend))
    try:
        yield
    finally:
        _in_use.reset(token)


def _known(name: str) -> str:
    backends = registry().backends
    if name in backends:
        return name
    failure = registry().failure_of(name)
    if failure is not None:
        raise BackendNotFoundError(f"backend {name!r} is not usable: {failure.reason.message}")
    if name in KNOWN_BACKENDS:
        raise BackendNotFoundError(f"backend {name!r} is not installed: {KNOWN_BACKENDS[name]}")
    raise BackendNotFoundError(f"no backend is called {name!r}: {nearest_name(name, backends)}")


def _asked(argument: str | None) -> tuple[str | None, str]:
    if argument is not None:
        return _known(argument), "argument"
    current = _in_use.get()
    if current is not None:
        return current, "use()"
    environment = os.environ.get("LONGCTX_BACKEND", "").strip().lower()
    if environment and environment != "auto":
        return _known(environment), "LONGCTX_BACKEND"
    return None, "priority"


def _candidate(name: str, request: OpRequest) -> Candidate:
    loaded = registry().load_backend(name)
    if isinstance(loaded, tuple):
        return Candidate(name, None, loaded)
    support = loaded.support().get(request.op)
    reasons = reasons_against(support, request)
    if support is None or reasons:
        return Candidate(name, None, reasons)
    try:
        reasons = tuple(loaded.reasons(request))
    except Exception as error:  # a backend that cannot answer does not take the others down
        message = f"reasons() raised {type(error).__name__}: {error}"
        reasons = (Reason(ReasonCode.IMPORT_FAILED, message),)
    return Candidate(name, support.priority_on(request.arch), reasons)


def absent_backends() -> dict[str, tuple[Reason, ...]]:
    """Return why well-known backends, and those that failed to register, are not there."""
    found = registry()
    absent: dict[str, tuple[Reason, ...]] = {
        name: (Reason(ReasonCode.NOT_INSTALLED, "not installed", command),)
        for name, command in KNOWN_BACKENDS.items()
        if name not in found.backends
    }
    for name in absent:
        failure = found.failure_of(name)
        if failure is not None:
            absent[name] = (failure.reason,)
    return absent


def _explain_request(request: OpRequest, asked: str | None, asked_by: str) -> Explanation:
    candidates = [_candidate(name, request) for name in registry().backends]
    candidates += [Candidate(name, None, reasons) for name, reasons in absent_backends().items()]
    return _explanation(request, asked, asked_by, candidates)


def _explanation(
    request: OpRequest, asked: str | None, asked_by: str, candidates: list[Candidate]
) -> Explanation:
    candidates.sort(key=lambda c: (not c.can_run, -(c.priority or 0), c.backend))
    able = [c.backend for c in candidates if c.can_run and (asked is None or c.backend == asked)]
    chosen = able[0] if able else None
    return Explanation(request, chosen, asked, asked_by, tuple(candidates))


def explain_refusal(explanation: Explanation) -> UnsupportedError:
    """Return the error that quotes the request and the reasons of who was asked."""
    request, asked = explanation.request, explanation.asked
    if asked is None:
        return UnsupportedError(f"no backend can run {explanation}")
    candidate = next(c for c in explanation.candidates if c.backend == asked)
    why = "; ".join(r.message + (f" ({r.hint})" if r.hint else "") for r in candidate.reasons)
    return UnsupportedError(
        f"backend {asked!r}, asked for by {explanation.asked_by}, cannot run {request.op} for "
        f"{request.describe()}: {why}"
    )


@functools.lru_cache(maxsize=4096)
def _choose_cached(
    op: str,
    device_type: str,
    arch: tuple[int, int] | None,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    features: tuple[str, ...],
    gradient: bool,
    asked: str | None,
    asked_by: str,
) -> str:
    # arguments in place of an OpRequest, whose making and hashing cost more than the look-up
    request = OpRequest(op, device_type, arch, dtype, *sizes, tuple(sorted(features)), gradient)
    if asked is None:
        explanation = _explain_request(request, asked, asked_by)
    else:  # the others are not loaded: one that hangs or crashes does no harm here
        explanation = _explanation(request, asked, asked_by, [_candidate(asked, request)])
    if explanation.chosen is None:
        raise explain_refusal(explanation)
    if asked is None:
        _log_choice(op, explanation.chosen)
    return explanation.chosen


@functools.lru_cache(maxsize=256)
def _log_choice(op: str, chosen: str) -> None:
    log.info("%s runs on backend %s (chosen by priority)", op, chosen)


def forget_choices() -> None:
    """Drop cached choices; called when the registry is rebuilt."""
    _choose_cached.cache_clear()
    _log_choice.cache_clear()
    primitive.cache_clear()


on_reset(forget_choices)


@functools.lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def arch_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device, None for other devices."""
    if device.type != "cuda":
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def _resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    features: tuple[str, ...],
    gradient: bool,
    backend: str | None,
) -> str:
    asked, asked_by = _asked(backend)
    return _choose_cached(
        op, device.type, arch_of(device), dtype, sizes, features, gradient, asked, asked_by
    )


# What torch.compiler.assume_constant_result does, without importing torch._dynamo (seconds) here:
# under torch.compile the choice is made once, at trace time.
setattr(_resolve, "_dynamo_marked_constant", True)  # noqa: B010


def bound_to(backend: str | BoundBackend | None) -> str | None:
    """Return the name of a bound backend: then the request need not be put together."""
    return backend.name if isinstance(backend, BoundBackend) else None


def choose(
    op: str,
    q: torch.Tensor,
    *,
    head_dim: int,
    value_dim: int,
    q_heads: int,
    kv_heads: int,
    features: tuple[str, ...] = (),
    gradient: bool = False,
    backend: str | BoundBackend | None = None,
) -> str:
    """Return the name of the backend that runs this call.

    Parameters
    ----------
    op : str
        Public op name.
    q : Tensor
        The op's first tensor: its device and dtype count.
    head_dim, value_dim, q_heads, kv_heads : int
        Sizes in the meaning of `OpRequest`.
    features : tuple of str
        Optional features that the call uses.
    gradient : bool
        Whether a backward pass will be asked for.
    backend : str or BoundBackend, optional
        The caller's choice; a `BoundBackend` is taken as it is.

    Raises
    ------
    BackendNotFoundError
        If ``backend`` (or `use`, or ``LONGCTX_BACKEND``) names nobody.
    UnsupportedError
        If the named backend, or every backend, refuses; quotes the request and all reasons.
    """
    if isinstance(backend, BoundBackend):
        return backend.name
    # index() makes symbolic sizes concrete under torch.compile: dispatch is by value, with a guard
    sizes = (
        operator.index(head_dim),
        operator.index(value_dim),
        operator.index(q_heads),
        operator.index(kv_heads),
    )
    return _resolve(op, q.device, q.dtype, sizes, features, gradient, backend)


def loaded_backend(name: str) -> Backend:
    """Return a backend that dispatch has chosen before."""
    loaded = registry().load_backend(_known(name))
    if isinstance(loaded, tuple):
        why = "; ".join(reason.message for reason in loaded)
        raise UnsupportedError(f"backend {name!r} cannot be loaded: {why}")
    return loaded


@functools.lru_cache(maxsize=1024)
def primitive(backend: str, name: str) -> Callable[..., Any]:
    """Return a backend's primitive by name."""
    return loaded_backend(backend).primitive(name)


def explain(
    op: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    value_dim: int | None = None,
    q_heads: int = 32,
    kv_heads: int = 8,
    features: tuple[str, ...] = (),
    gradient: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Return which backend would run an op, and why the others would not, without running it.

    Parameters
    ----------
    op : str
        Public op name, such as ``"flash_attention"``.
    device : str or torch.device, optional
        Default: ``"cuda"`` if there is one, else ``"cpu"``.
    dtype, head_dim, value_dim, q_heads, kv_heads, features, gradient
        The request, as in `OpRequest`; ``value_dim`` defaults to ``head_dim``.
    backend : str, optional
        A backend asked for by name.

    Returns
    -------
    Explanation
        ``str()`` of it is the table that ``longctx explain`` prints.

    Examples
    --------
    >>> import longctx, torch
    >>> longctx.explain("flash_attention", device="cpu", dtype=torch.float32).chosen
    'torch'
    """
    known_op(op)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device if device is not None else default)
    arch = arch_of(where) if where.type != "cuda" or torch.cuda.is_available() else None
    request = OpRequest(
        op,
        where.type,
        arch,
        dtype,
        head_dim,
        head_dim if value_dim is None else value_dim,
        q_heads,
        kv_heads,
        tuple(sorted(features)),
        gradient,
    )
    asked, asked_by = _asked(backend)
    return _explain_request(request, asked, asked_by)


def known_op(op: str) -> str:
    """Return ``op`` if it is public; raise `BackendNotFoundError` with the nearest name if not."""
    if op not in OPS:
        raise BackendNotFoundError(f"no op is called {op!r}: {nearest_name(op, OPS)}")
    return op
