"""Registration of the CuPy backend; nothing of CuPy is imported before the first use."""

from __future__ import annotations

from longctx import PROTOCOL_VERSION, Backend, BackendBase, BackendInfo, Reason, hookimpl
from longctx.probes import distribution_version, missing_cuda, missing_library

__all__ = ["longctx_backends", "missing"]

_INSTALL = "pip install 'longctx-backend-cupy[cuda13]'"


def missing() -> tuple[Reason, ...]:
    """Return what this machine lacks: the library, a driver, a GPU."""
    return (*missing_library("cupy", _INSTALL), *missing_cuda())


def _load() -> Backend:
    from longctx_cupy.support import SUPPORT

    return BackendBase(SUPPORT, {})


@hookimpl
def longctx_backends() -> list[BackendInfo]:
    """Offer the backend called ``"cupy"``."""
    return [
        BackendInfo(
            name="cupy",
            version=distribution_version("longctx-backend-cupy"),
            protocol=PROTOCOL_VERSION,
            load=_load,
            missing=missing,
            description="CUDA C++ kernels compiled at run time through CuPy and NVRTC",
        )
    ]
