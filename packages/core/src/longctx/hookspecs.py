"""The pluggy hooks of ``longctx``; each returns cheap metadata and imports no kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from longctx.protocols.backend import BackendInfo
    from longctx.protocols.kv_cache import KVCacheInfo
    from longctx.protocols.selector import SelectorInfo

__all__ = ["PROJECT", "Hooks", "hookimpl"]

PROJECT = "longctx"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """What a plugin module may define, each marked with ``@longctx.hookimpl``."""

    @hookspec
    def longctx_backends(self) -> Sequence[BackendInfo]:
        """Return the backends that this plugin brings."""
        return ()

    @hookspec
    def longctx_selectors(self) -> Sequence[SelectorInfo]:
        """Return the sparsity selectors that this plugin brings."""
        return ()

    @hookspec
    def longctx_kv_caches(self) -> Sequence[KVCacheInfo]:
        """Return the KV caches that this plugin brings."""
        return ()
