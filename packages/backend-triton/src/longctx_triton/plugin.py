"""Registration of the Triton backend; nothing of Triton is imported before the first use."""

from __future__ import annotations

import os
from importlib import metadata

from longctx import (
    PROTOCOL_VERSION,
    Backend,
    BackendBase,
    BackendInfo,
    Reason,
    ReasonCode,
    hookimpl,
)
from longctx.probes import distribution_version, missing_cuda, missing_library

__all__ = ["interpreting", "longctx_backends", "missing"]

_INSTALL = 'pip install "triton>=3.6,<3.10"'

OLDEST, NEWEST = (3, 6), (3, 9)
"""Triton versions (major, minor) that the kernels are written for, inclusive."""


def missing() -> tuple[Reason, ...]:
    """Return what this machine lacks: the library, a fitting version of it, a driver, a GPU.

    With ``TRITON_INTERPRET=1`` kernels run on the CPU, and neither driver nor GPU is wanted.
    """
    reasons = missing_library("triton", _INSTALL) or _unfit_version()
    return reasons if interpreting() else (*reasons, *missing_cuda())


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def _unfit_version() -> tuple[Reason, ...]:
    installed = metadata.version("triton")
    major, minor = (int(part) for part in installed.split(".")[:2])
    if OLDEST <= (major, minor) <= NEWEST:
        return ()
    bounds = " to ".join(".".join(map(str, v)) for v in (OLDEST, NEWEST))
    message = f"triton {installed} is installed, the kernels are written for {bounds}"
    return (Reason(ReasonCode.NOT_INSTALLED, message, _INSTALL),)


def _load() -> Backend:
    from longctx_triton import block_sparse, decode, dsa, flash, lightning, star, token_sparse
    from longctx_triton.launch.device import launched
    from longctx_triton.support import SUPPORT, interpreted

    families = (flash, decode, lightning, dsa, block_sparse, star, token_sparse)
    primitives = {
        name: launched(getattr(family, name)) for family in families for name in family.__all__
    }
    return BackendBase(interpreted(SUPPORT) if interpreting() else SUPPORT, primitives)


@hookimpl
def longctx_backends() -> list[BackendInfo]:
    """Offer the backend called ``"triton"``."""
    return [
        BackendInfo(
            name="triton",
            version=distribution_version("longctx-backend-triton"),
            protocol=PROTOCOL_VERSION,
            load=_load,
            missing=missing,
            description="Triton and Gluon kernels for NVIDIA GPUs (sm_80 and later)",
        )
    ]
