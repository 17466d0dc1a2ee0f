"""A KV cache in one block of memory a layer, which grows geometrically."""

from __future__ import annotations

import weakref
from typing import Self

import torch
from torch import Tensor

from longctx.protocols.kv_cache import CacheView
from longctx_models.caches.base import CacheBase, CacheSizes

__all__ = ["ContiguousCache"]

_GROWTH = 1.5
_ROUND = 64
_SHRINK = 4


class _Slab:
    """Memory of one layer: ``[B, Hkv, capacity, D]``, seen as ``[B, capacity, Hkv, D]``.

    Caches that forked share a slab. ``filled`` is the number of slots that any of them has
    written: the one whose own length reaches it may write behind it without disturbing the
    others.
    """

    def __init__(self, sizes: CacheSizes, capacity: int) -> None:
        def block(size: int) -> Tensor:
            shape = (sizes.batch, sizes.kv_heads, capacity, size)
            return torch.empty(shape, dtype=sizes.dtype, device=sizes.device).transpose(1, 2)

        # ordinary tensors, so that a cache made under inference_mode can be written outside it
        with torch.inference_mode(False):
            self.k, self.v = block(sizes.head_dim), block(sizes.value_dim)
        self.capacity = capacity
        self.filled = 0
        self.users: weakref.WeakSet[ContiguousCache] = weakref.WeakSet()

    def put(self, start: int, k: Tensor, v: Tensor) -> None:
        end = start + k.shape[1]
        self.k[:, start:end] = k
        self.v[:, start:end] = v
        self.filled = end


class ContiguousCache(CacheBase):
    """Keys and values of every layer in one block each.

    Appending writes in place; a full block grows by half. `gather` and `view` are views. A fork
    copies a layer when it writes where the other has written too.

    Parameters
    ----------
    layers, batch, kv_heads, head_dim : int
    value_dim : int, optional
        Default ``head_dim``.
    dtype : torch.dtype
    device : torch.device or str
    capacity : int
        Tokens to make room for at once; more are made room for as they come.
    max_tokens : int, optional
        Refuse to hold more slots than this in a layer.

    Examples
    --------
    >>> cache = ContiguousCache(2, 1, 4, 64)
    >>> cache.append(0, torch.zeros(1, 5, 4, 64), torch.zeros(1, 5, 4, 64))
    >>> cache.physical_length(0), cache.view(0).length
    (5, 5)
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(
            layers, batch, kv_heads, head_dim, value_dim=value_dim, dtype=dtype, device=device,
            capacity=capacity,
        )  # fmt: skip
        self.max_tokens = max_tokens
        self._slabs = [self._new_slab(self.sizes, capacity) for _ in range(layers)]

    def view(self, layer: int) -> CacheView:
        """Return the layer's whole block with its length."""
        slab, length = self._slabs[layer], self._physical[layer]
        return CacheView(slab.k, slab.v, self._lengths_tensor(length), length)

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return ``(k, v)`` as ``[B, physical, Hkv, D]``, views of the block."""
        slab, length = self._slabs[layer], self._physical[layer]
        return slab.k[:, :length], slab.v[:, :length]

    def nbytes(self) -> int:
        """Return the bytes of the blocks, spare slots included, and of the side state."""
        slots = sum(slab.capacity for slab in self._slabs)
        return slots * self.sizes.batch * self.sizes.token_bytes + self._auxiliary_bytes()

    def _new_slab(self, sizes: CacheSizes, capacity: int) -> _Slab:
        slab = _Slab(sizes, -(-capacity // _ROUND) * _ROUND)
        slab.users.add(self)
        return slab

    def _write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        needed = start + k.shape[1]
        if self.max_tokens is not None and needed > self.max_tokens:
            raise ValueError(
                f"no room in layer {layer}: {needed} tokens, the cache is limited to "
                f"{self.max_tokens}"
            )
        slab = self._slabs[layer]
        alone = start == slab.filled or len(slab.users) == 1
        if needed > slab.capacity or not alone:
            grown = needed if slab.capacity == 0 else max(needed, int(slab.capacity * _GROWTH))
            slab = self._replace(layer, grown if needed > slab.capacity else slab.capacity)
        slab.put(start, k, v)

    def _replace(self, layer: int, capacity: int) -> _Slab:
        """Move a layer into a block of its own."""
        old = self._slabs[layer]
        slab = self._new_slab(self.sizes, capacity)
        k, v = self.gather(layer)
        slab.put(0, k, v)
        old.users.discard(self)
        self._slabs[layer] = slab
        return slab

    def _truncate(self, layer: int, length: int) -> None:
        slab = self._slabs[layer]
        if len(slab.users) == 1:
            slab.filled = length

    def _keep(self, layer: int, slots: Tensor) -> None:
        k, v = (
            t.transpose(1, 2).gather(2, slots.unsqueeze(-1).expand(-1, -1, -1, t.shape[3]))
            for t in self.gather(layer)
        )
        slab, kept = self._slabs[layer], slots.shape[-1]
        if len(slab.users) > 1 or slab.capacity > _SHRINK * max(kept, _ROUND):
            slab.users.discard(self)
            slab = self._slabs[layer] = self._new_slab(self.sizes, kept)
        slab.put(0, k.transpose(1, 2), v.transpose(1, 2))

    def _empty_like(self) -> Self:
        s = self.sizes
        return type(self)(
            s.layers, s.batch, s.kv_heads, s.head_dim, value_dim=s.value_dim, dtype=s.dtype,
            device=s.device, max_tokens=self.max_tokens,
        )  # fmt: skip

    def _share_with(self, other: Self) -> None:
        other._slabs = list(self._slabs)
        for slab, length in zip(self._slabs, self._physical, strict=True):
            if len(slab.users) == 1:
                slab.filled = length  # what dropped forks wrote behind it is nobody's now
            slab.users.add(other)

    def _moved(self, layer: int, sizes: CacheSizes) -> _Slab:
        slab = _Slab(sizes, self._slabs[layer].capacity)
        slab.put(0, *self.gather(layer))
        return slab

    def _adopt_moved(self, layers: list[_Slab]) -> None:
        for old, new in zip(self._slabs, layers, strict=True):
            old.users.discard(self)
            new.users.add(self)
        self._slabs = layers
