"""What the KV caches share: sizes, bookkeeping of lengths, marks and side state, and files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from longctx.plans import RetentionPlan
from longctx.protocols.kv_cache import CacheView
from longctx_models.caches.storage import read_cache, write_cache

__all__ = ["CacheBase", "CacheSizes"]


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of a cache.

    Attributes
    ----------
    layers, batch, kv_heads, head_dim, value_dim : int
    dtype : torch.dtype
    device : torch.device
    """

    layers: int
    batch: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one sequence in one layer."""
        return self.kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize


class CacheBase(ABC):
    """Bookkeeping of a `longctx.protocols.kv_cache.KVCache`; subclasses own the memory.

    All sequences of the batch have one length. Layers are appended to one after the other during a
    forward call; `mark`, `rollback`, `fork` and `save` belong between calls. Side state is
    cloned by `mark` and `fork`, so it may be written in place.

    Parameters
    ----------
    layers, batch, kv_heads, head_dim : int
    value_dim : int, optional
        Default ``head_dim``.
    dtype : torch.dtype
    device : torch.device or str
    capacity : int
        Tokens a sequence to make room for at once.
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
    ) -> None:
        counts = {"layers": layers, "batch": batch, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, size in counts.items():
            if size < 1:
                raise ValueError(f"a cache needs {name} of at least 1, got {size}")
        if capacity < 0:
            raise ValueError(f"capacity must be at least 0, got {capacity}")
        values = head_dim if value_dim is None else value_dim
        self.sizes = CacheSizes(
            layers, batch, kv_heads, head_dim, values, dtype, torch.empty(0, device=device).device
        )
        self._logical = [0] * layers
        self._physical = [0] * layers
        self._evicted_at = [0] * layers
        self._auxiliary: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self._marks: dict[int, list[dict[str, Tensor]]] = {}
        self._seqlens: tuple[int, Tensor] | None = None

    @abstractmethod
    def _empty_like(self) -> Self:
        """Return an empty cache of the same sizes and options, without room."""

    @abstractmethod
    def _write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Store tokens from physical slot ``start`` on; raise before anything is stored."""

    @abstractmethod
    def _truncate(self, layer: int, length: int) -> None:
        """Give up the slots from ``length`` on."""

    @abstractmethod
    def _keep(self, layer: int, slots: Tensor) -> None:
        """Keep the slots ``[B, Hkv, n]`` int64, in this order."""

    @abstractmethod
    def _share_with(self, other: Self) -> None:
        """Let an empty cache of the same sizes refer to this one's memory."""

    @abstractmethod
    def _moved(self, layer: int, sizes: CacheSizes) -> Any:
        """Return a copy of a layer's memory made for other sizes."""

    @abstractmethod
    def _adopt_moved(self, layers: list[Any]) -> None:
        """Take what `_moved` returned in place of the present memory."""

    @abstractmethod
    def view(self, layer: int) -> CacheView:
        """Return the layer's memory as the decode op takes it, without copying."""

    @abstractmethod
    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return ``(k, v)`` as ``[B, physical, Hkv, D]``."""

    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes of the slots held, used or spare, and of the side state."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store ``k [B, S, Hkv, D]`` and ``v [B, S, Hkv, Dv]`` behind what the layer holds.

        Raises
        ------
        ValueError
            If shape, dtype or device do not fit, or there is no room; nothing is stored then.
        """
        s = self.sizes
        for name, tensor, size in (("k", k, s.head_dim), ("v", v, s.value_dim)):
            wanted = (s.batch, k.shape[1], s.kv_heads, size)
            if tensor.shape != wanted or tensor.dtype != s.dtype or tensor.device != s.device:
                raise ValueError(
                    f"{name} must be (batch {s.batch}, tokens, kv_heads {s.kv_heads}, size "
                    f"{size}) in "
                    f"{s.dtype} on {s.device}, got {tuple(tensor.shape)} in {tensor.dtype} on "
                    f"{tensor.device}"
                )
        start = self._physical[layer]
        if k.shape[1]:
            self._write(layer, start, k.detach(), v.detach())
        self._physical[layer] = start + k.shape[1]
        self._logical[layer] += k.shape[1]

    def logical_length(self) -> int:
        """Return the number of tokens appended so far: the next token's position."""
        return max(self._logical)

    def physical_length(self, layer: int) -> int:
        """Return the number of slots that a layer holds."""
        return self._physical[layer]

    def auxiliary(self, layer: int) -> dict[str, Tensor]:
        """Return the layer's named side state; entries may be added, replaced and written."""
        return self._auxiliary[layer]

    def mark(self) -> int:
        """Return a mark of the present state for `rollback`; it holds a copy of the side state."""
        mark = self.logical_length()
        self._marks[mark] = _cloned(self._auxiliary) if any(self._auxiliary) else []
        return mark

    def rollback(self, mark: int) -> None:
        """Drop what was appended since ``mark``.

        Raises
        ------
        ValueError
            If the mark lies in the future, before an eviction, or was never taken.
        """
        if mark > self.logical_length():
            raise ValueError(
                f"mark {mark} lies in the future: the cache holds {self.logical_length()} tokens"
            )
        if mark < max(self._evicted_at):
            raise ValueError(
                f"mark {mark} lies before the eviction at {max(self._evicted_at)} tokens, which "
                "cannot be undone: fork the cache before evicting"
            )
        if mark not in self._marks:
            raise ValueError(f"mark {mark} was not taken: use what mark() returned")
        for layer, logical in enumerate(self._logical):
            if logical > mark:
                self._physical[layer] -= logical - mark
                self._logical[layer] = mark
                self._truncate(layer, self._physical[layer])
        state = self._marks[mark] or [{} for _ in self._auxiliary]
        self._auxiliary = _cloned(state)
        self._marks = {at: state for at, state in self._marks.items() if at <= mark}

    def fork(self) -> Self:
        """Return an independent cache that shares the present content until one of them writes.

        Marks of this cache hold for the fork too.
        """
        other = self._empty_like()
        other._logical = list(self._logical)
        other._physical = list(self._physical)
        other._evicted_at = list(self._evicted_at)
        other._auxiliary = _cloned(self._auxiliary)
        other._marks = {mark: _cloned(state) for mark, state in self._marks.items()}
        self._share_with(other)
        return other

    def retain(self, layer: int, plan: RetentionPlan) -> None:
        """Keep only the slots of ``plan`` in a layer; logical length and positions stay.

        The kept slots may differ by sequence and KV head, their number may not: a layer stays
        rectangular. Checking that reads the plan, which waits for the device.

        Raises
        ------
        ValueError
            If the counts differ, or the slots are not ascending within the layer.
        """
        s, held = self.sizes, self._physical[layer]
        plan.check(batch=s.batch, q_heads=s.kv_heads, kv_heads=s.kv_heads, q_len=1, k_len=held)
        counts = sorted(set(plan.counts.flatten().tolist()))
        if len(counts) != 1:
            raise ValueError(
                f"a layer keeps as many slots in every KV head, got counts from {counts[0]} to "
                f"{counts[-1]}: pad the smaller sets"
            )
        slots = plan.indices[..., : counts[0]].to(s.device).long()
        if slots.numel():
            ascending = bool((slots.diff(dim=-1) > 0).all()) and int(slots[..., 0].min()) >= 0
            if slots.shape[-1] != counts[0] or not ascending or int(slots.max()) >= held:
                raise ValueError(
                    f"slots to keep must ascend within the {held} that layer {layer} holds"
                )
        if counts[0] == held:
            return
        self._keep(layer, slots)
        self._physical[layer] = counts[0]
        self._evicted_at[layer] = self._logical[layer]

    def save(self, path: Path) -> None:
        """Write the cache to a safetensors file; the file appears whole or not at all.

        Raises
        ------
        OSError
            If the file cannot be written whole, as on a full disk; nothing is left behind.
        """
        lengths = (tuple(self._logical), tuple(self._physical), tuple(self._evicted_at))
        auxiliary = {
            f"{layer}.{name}": tensor
            for layer, state in enumerate(self._auxiliary)
            for name, tensor in state.items()
        }
        write_cache(Path(path), self.sizes.batch, lengths, self.gather, auxiliary)

    @classmethod
    def load(
        cls, path: Path, *, device: torch.device | str = "cpu", capacity: int = 0, **options: Any
    ) -> Self:
        """Return a cache read from what `save` of any of our caches wrote.

        Parameters
        ----------
        path : Path
        device : torch.device or str
        capacity : int
            Tokens to make room for, at least what the file holds.
        **options
            Further options of this kind of cache.

        Raises
        ------
        ValueError
            If the file is damaged or holds something else.
        """
        with read_cache(Path(path)) as saved:
            k, v = saved.layer(0)
            cache = cls(
                len(saved.logical),
                saved.batch,
                k.shape[2],
                k.shape[3],
                value_dim=v.shape[3],
                dtype=k.dtype,
                device=device,
                capacity=max(capacity, *saved.physical),
                **options,
            )
            where = cache.sizes.device
            for layer in range(len(saved.logical)):
                k, v = saved.layer(layer)
                cache.append(layer, k.to(where), v.to(where))
            cache._logical, cache._evicted_at = list(saved.logical), list(saved.evicted_at)
            for name, tensor in saved.auxiliary().items():
                layer_name, _, key = name.partition(".")
                cache._auxiliary[int(layer_name)][key] = tensor.to(where)
        return cache

    def offload(self, device: str) -> None:
        """Move the content to another device; forks keep theirs where it is."""
        sizes = replace(self.sizes, device=torch.empty(0, device=device).device)
        if sizes == self.sizes:
            return
        layers = [self._moved(layer, sizes) for layer in range(sizes.layers)]
        self._auxiliary = _cloned(self._auxiliary, sizes.device)
        self._marks = {mark: _cloned(s, sizes.device) for mark, s in self._marks.items()}
        self._seqlens = None
        self.sizes = sizes
        self._adopt_moved(layers)

    def _lengths_tensor(self, length: int) -> Tensor:
        """Return int32 ``[B]`` of one length; kept, as all layers of a step ask for the same."""
        if self._seqlens is None or self._seqlens[0] != length:
            tensor = torch.full(
                (self.sizes.batch,), length, dtype=torch.int32, device=self.sizes.device
            )
            self._seqlens = (length, tensor)
        return self._seqlens[1]

    def _auxiliary_bytes(self) -> int:
        return sum(t.nbytes for state in self._auxiliary for t in state.values())


def _cloned(
    states: list[dict[str, Tensor]], device: torch.device | None = None
) -> list[dict[str, Tensor]]:
    return [
        {name: t.clone() if device is None else t.to(device, copy=True) for name, t in s.items()}
        for s in states
    ]
