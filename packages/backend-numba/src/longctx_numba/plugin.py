"""Registration of the Numba backend; nothing of Numba is imported before the first use."""

from __future__ import annotations

from longctx import PROTOCOL_VERSION, Backend, BackendBase, BackendInfo, Reason, hookimpl
from longctx.probes import distribution_version, missing_cuda, missing_library

__all__ = ["longctx_backends", "missing"]

_INSTALL = "pip install 'longctx-backend-numba[cuda13]'"


def missing() -> tuple[Reason, ...]:
    """Return what this machine lacks: the library, a driver, a GPU."""
    return (*missing_library("numba_cuda", _INSTALL), *missing_cuda())


def _load() -> Backend:
    from longctx_numba.support import SUPPORT

    return BackendBase(SUPPORT, {})


@hookimpl
def longctx_backends() -> list[BackendInfo]:
    """Offer the backend called ``"numba"``."""
    return [
        BackendInfo(
            name="numba",
            version=distribution_version("longctx-backend-numba"),
            protocol=PROTOCOL_VERSION,
            load=_load,
            missing=missing,
            description="Numba CUDA kernels: the readable backend",
        )
    ]
