"""Names of Gluon that differ between Triton 3.6 and 3.9, under the newer name."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["async_load", "async_store"]

if hasattr(tma, "async_load"):
    async_load = tma.async_load
    async_store = tma.async_store
else:
    async_load = tma.async_copy_global_to_shared
    async_store = tma.async_copy_shared_to_global
