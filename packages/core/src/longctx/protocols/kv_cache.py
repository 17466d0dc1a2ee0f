"""The KV cache protocol: memory of the keys and values that later tokens attend to.

Shapes: ``B`` batch, ``S`` tokens of this call, ``Hkv`` KV heads, ``D``/``Dv`` key/value head size.
"Logical" length counts the tokens that were ever appended (positions go on from there); "physical"
length counts the slots that are still held, which eviction makes smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from longctx.plans import RetentionPlan

__all__ = ["CacheView", "KVCache", "KVCacheInfo"]


@dataclass(frozen=True)
class CacheView:
    """What attention reads of one layer, in the layout of `longctx.decode_attention`.

    Attributes
    ----------
    k, v : Tensor
        ``[B, capacity, Hkv, D]`` when contiguous, ``[pages, page_size, Hkv, D]`` when paged.
    seqlens : Tensor, (B,), int32
        Physical lengths, on the cache's device.
    page_table : Tensor, (B, max_pages), int32, or None
    k_scale, v_scale : Tensor, (B, Hkv), float32, or None
        Scales of an fp8 cache.
    length : int
        Physical length common to the batch, known on the host.
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    length: int
    page_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@runtime_checkable
class KVCache(Protocol):
    """Keys and values of all layers of one batch of sequences."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store ``k [B, S, Hkv, D]``, ``v [B, S, Hkv, Dv]`` behind what the layer holds.

        Raises
        ------
        ValueError
            If the shapes do not fit the cache, or there is no room; nothing is stored then.
        """
        ...

    def view(self, layer: int) -> CacheView:
        """Return the layer's memory as the decode op takes it, without copying."""
        ...

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return ``(k, v)`` as ``[B, physical, Hkv, D]``: a view, or a copy when paged."""
        ...

    def logical_length(self) -> int:
        """Return the number of tokens appended so far: the next token's position."""
        ...

    def physical_length(self, layer: int) -> int:
        """Return the number of slots that a layer holds."""
        ...

    def mark(self) -> int:
        """Return a mark of the present state for `rollback`."""
        ...

    def rollback(self, mark: int) -> None:
        """Drop what was appended since ``mark``.

        Raises
        ------
        ValueError
            If the mark lies in the future, or before an eviction that cannot be undone.
        """
        ...

    def fork(self) -> KVCache:
        """Return an independent cache that shares the present content until one of them writes."""
        ...

    def retain(self, layer: int, plan: RetentionPlan) -> None:
        """Keep only the slots of ``plan`` in a layer; logical length and positions stay."""
        ...

    def nbytes(self) -> int:
        """Return the bytes held, shared content counted once a cache."""
        ...

    def auxiliary(self, layer: int) -> dict[str, Tensor]:
        """Return the layer's named side state (page bounds, indexer keys, lightning states)."""
        ...

    def save(self, path: Path) -> None:
        """Write the cache to a safetensors file; the file appears whole or not at all."""
        ...

    def offload(self, device: str) -> None:
        """Move the content to another device."""
        ...


@dataclass(frozen=True)
class KVCacheInfo:
    """Metadata of a KV cache plugin.

    Attributes
    ----------
    name : str
        Unique name, such as ``"paged"``.
    version : str
        Version of the distribution that brings it.
    protocol : (int, int)
        Protocol version it was written for.
    load : callable
        Imports and returns the cache's factory.
    description : str
        One line for listings.
    """

    name: str
    version: str
    protocol: tuple[int, int]
    load: Callable[[], Any]
    description: str = ""
