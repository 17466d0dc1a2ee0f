"""Does a loaded backend keep the protocol's signatures? Checked once, when it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from longctx.protocols import attention
from longctx.protocols.backend import Backend
from longctx.protocols.families import GRADIENT_PRIMITIVES, OPS
from longctx.support import OpSupport

__all__ = ["contract_breach"]

_PROTOCOLS = (
    attention.FlashAttention,
    attention.DecodeAttention,
    attention.LightningAttention,
    attention.SparseIndexer,
    attention.BlockSparseAttention,
    attention.StarAttention,
    attention.TokenSparseAttention,
)


def contract_breach(backend: Any) -> str | None:
    """Return the first way in which a backend breaks the protocol, None if it keeps it.

    Parameters
    ----------
    backend : object
        What a plugin's ``load()`` returned.

    Returns
    -------
    str or None
        One phrase that names the op or primitive.
    """
    if not isinstance(backend, Backend):
        return f"load() gave {type(backend).__name__}, which lacks support/reasons/primitive"
    declared: Mapping[str, Any] = backend.support()
    for op, support in declared.items():
        if not isinstance(support, OpSupport):
            return f"declares {op} by {type(support).__name__} instead of OpSupport"
        if op not in OPS:
            return f"declares support for an unknown op {op!r}"
        present = [name for name in OPS[op] if _primitive(backend, name) is not None]
        if not present:
            return f"declares {op} but brings none of {', '.join(OPS[op])}"
        if support.gradient and op in GRADIENT_PRIMITIVES:
            backward = GRADIENT_PRIMITIVES[op]
            if _primitive(backend, backward) is None:
                return f"declares a gradient for {op} but brings no {backward}"
            present.append(backward)
        for name in present:
            difference = _signature_difference(backend, name)
            if difference:
                return f"{name} {difference}"
    return None


def _primitive(backend: Backend, name: str) -> object | None:
    try:
        return backend.primitive(name)
    except (KeyError, AttributeError):
        return None


def _signature_difference(backend: Backend, name: str) -> str | None:
    specified = next(getattr(p, name) for p in _PROTOCOLS if hasattr(p, name))
    wanted = [p for p in inspect.signature(specified).parameters.values() if p.name != "self"]
    try:
        given = inspect.signature(backend.primitive(name)).parameters
    except (TypeError, ValueError):  # a compiled callable without a signature is taken on trust
        return None
    if any(p.kind is p.VAR_KEYWORD for p in given.values()):
        return None
    missing = [p.name for p in wanted if p.name not in given]
    if missing:
        return f"does not take {', '.join(missing)}"
    names = {p.name for p in wanted}
    extra = [p.name for p in given.values() if p.name not in names and p.default is p.empty]
    return f"requires unknown arguments {', '.join(extra)}" if extra else None
