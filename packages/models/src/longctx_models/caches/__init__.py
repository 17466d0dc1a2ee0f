"""KV caches that keep the protocol `longctx.protocols.kv_cache.KVCache`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from longctx.errors import BackendNotFoundError, nearest_name
from longctx.plugins import registry
from longctx.protocols.kv_cache import KVCache
from longctx_models.caches.base import CacheBase, CacheSizes
from longctx_models.caches.contiguous import ContiguousCache
from longctx_models.caches.paged import PagedCache

__all__ = [
    "CACHES",
    "CacheBase",
    "CacheSizes",
    "ContiguousCache",
    "PagedCache",
    "cache_factory",
]

CACHES: Mapping[str, Callable[..., KVCache]] = {"contiguous": ContiguousCache, "paged": PagedCache}
"""The built-in caches by name."""


def cache_factory(name: str) -> Callable[..., KVCache]:
    """Return the maker of a cache by name; it is called as `ContiguousCache`.

    Parameters
    ----------
    name : str
        A name in `CACHES`, or the name of a cache that a plugin brings.

    Raises
    ------
    BackendNotFoundError
        If nobody brings the name; the message has the nearest one.
    """
    if name in CACHES:
        return CACHES[name]
    plugins = registry().kv_caches
    if name not in plugins:
        raise BackendNotFoundError(
            f"no KV cache is called {name!r}: {nearest_name(name, {*CACHES, *plugins})}"
        )
    factory: Callable[..., KVCache] = plugins[name].load()
    return factory
