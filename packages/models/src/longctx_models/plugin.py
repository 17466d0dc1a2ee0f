"""What this package brings to ``longctx``: KV caches and sparsity selectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Any

from longctx import hookimpl
from longctx.protocols.kv_cache import KVCacheInfo
from longctx.protocols.selector import SelectorInfo

__all__ = ["longctx_kv_caches", "longctx_selectors"]

_PROTOCOL = (1, 0)


@hookimpl
def longctx_kv_caches() -> Sequence[KVCacheInfo]:
    """Return the contiguous and the paged cache."""
    return [
        KVCacheInfo("contiguous", _version(), _PROTOCOL, _loader("caches", "ContiguousCache"),
                    "one growing block a layer"),
        KVCacheInfo("paged", _version(), _PROTOCOL, _loader("caches", "PagedCache"),
                    "pages of fixed size, shared between forks"),
    ]  # fmt: skip


@hookimpl
def longctx_selectors() -> Sequence[SelectorInfo]:
    """Return the window and the token-sparse selector."""
    return [
        SelectorInfo("window", _version(), _PROTOCOL, _loader("selectors", "WindowSelector"),
                     "first tokens and a sliding window"),
        SelectorInfo("token-set", _version(), _PROTOCOL, _loader("selectors",
        "TokenSparseSelector"),
                     "the tokens that the last queries look at, a set a head"),
    ]  # fmt: skip


def _loader(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(import_module(f"longctx_models.{module}"), name)


def _version() -> str:
    return metadata.version("longctx-models")
