"""Names of Gluon that differ between Triton 3.6 and 3.9, under the newer name."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["async_load", "async_load_rows", "async_store", "barrier"]

if hasattr(tma, "async_load"):
    async_load = tma.async_load
    async_store = tma.async_store
else:
    async_load = tma.async_copy_global_to_shared
    async_store = tma.async_copy_shared_to_global

async_load_rows = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)
"""By pointers (`async_copy.async_load`), where `async_load` copies a block of a descriptor."""

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
