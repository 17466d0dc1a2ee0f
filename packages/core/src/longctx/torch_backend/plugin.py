"""Registration of the built-in backend; its implementation is imported on first use."""

from __future__ import annotations

from longctx.backend_base import BackendBase
from longctx.hookspecs import hookimpl
from longctx.probes import distribution_version
from longctx.protocols.backend import Backend, BackendInfo
from longctx.protocols.version import PROTOCOL_VERSION

__all__ = ["longctx_backends"]


def _load() -> Backend:
    from longctx.torch_backend import (
        block_sparse,
        decode,
        dsa,
        flash,
        lightning,
        star,
        token_sparse,
    )
    from longctx.torch_backend.support import SUPPORT

    families = (flash, decode, lightning, dsa, block_sparse, star, token_sparse)
    primitives = {name: getattr(family, name) for family in families for name in family.__all__}
    return BackendBase(SUPPORT, primitives)


@hookimpl
def longctx_backends() -> list[BackendInfo]:
    """Offer the backend called ``"torch"``."""
    return [
        BackendInfo(
            name="torch",
            version=distribution_version("longctx-core"),
            protocol=PROTOCOL_VERSION,
            load=_load,
            description="plain PyTorch on any device; the default without a GPU",
        )
    ]
