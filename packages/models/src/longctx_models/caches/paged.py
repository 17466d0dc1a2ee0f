"""A KV cache in pages of fixed size, shared between forks page by page."""

from __future__ import annotations

import weakref
from typing import Self

import torch
from torch import Tensor

from longctx.protocols.kv_cache import CacheView
from longctx_models.caches.base import CacheBase, CacheSizes

__all__ = ["PagedCache"]

_GROWTH = 1.5

Table = list[list[int]]
"""Page numbers of one layer, a list for each sequence of the batch."""


class _Pool:
    """Pages of one layer, ``[pages, page_size, Hkv, D]``, free list and reference counts."""

    def __init__(
        self, sizes: CacheSizes, page_size: int, pages: int, max_pages: int | None
    ) -> None:
        self.sizes, self.page_size, self.max_pages = sizes, page_size, max_pages
        self.references: list[int] = []
        self.free: list[int] = []
        self.k, self.v = self._blocks(0)
        self._grow(pages)

    def _blocks(self, pages: int) -> tuple[Tensor, Tensor]:
        s = self.sizes
        shape = (pages, self.page_size, s.kv_heads)
        # ordinary tensors, so that a cache made under inference_mode can be written outside it
        with torch.inference_mode(False):
            return (
                torch.empty(*shape, s.head_dim, dtype=s.dtype, device=s.device),
                torch.empty(*shape, s.value_dim, dtype=s.dtype, device=s.device),
            )

    def _grow(self, pages: int) -> None:
        held = len(self.references)
        if pages <= held:
            return
        k, v = self._blocks(pages)
        k[:held], v[:held] = self.k, self.v
        self.k, self.v = k, v
        self.references += [0] * (pages - held)
        self.free += range(pages - 1, held - 1, -1)

    def reserve(self, pages: int) -> None:
        """Make sure that ``pages`` are free; raise ValueError if the limit forbids it."""
        held = len(self.references)
        needed = held + pages - len(self.free)
        if needed <= held:
            return
        if self.max_pages is not None and needed > self.max_pages:
            raise ValueError(
                f"no room: {needed} pages of {self.page_size} tokens are needed, the cache is "
                "limited "
                f"to {self.max_pages}"
            )
        grown = max(needed, int(held * _GROWTH))
        self._grow(grown if self.max_pages is None else min(grown, self.max_pages))

    def take(self) -> int:
        """Return a free page, referred to once; `reserve` first."""
        page = self.free.pop()
        self.references[page] = 1
        return page

    def drop(self, page: int) -> None:
        """Refer to a page once less."""
        self.references[page] -= 1
        if self.references[page] == 0:
            self.free.append(page)


class PagedCache(CacheBase):
    """Keys and values in pages; a fork shares full pages and copies the one it writes to.

    `view` gives the pages and a page table, without copying; `gather` copies.

    Parameters
    ----------
    layers, batch, kv_heads, head_dim : int
    value_dim : int, optional
        Default ``head_dim``.
    dtype : torch.dtype
    device : torch.device or str
    capacity : int
        Tokens a sequence to make room for at once; the pool grows as more come.
    page_size : int
        Tokens a page.
    max_pages : int, optional
        Refuse to hold more pages than this in a layer, forks included.
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
        page_size: int = 64,
        max_pages: int | None = None,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        super().__init__(
            layers, batch, kv_heads, head_dim, value_dim=value_dim, dtype=dtype, device=device,
            capacity=capacity,
        )  # fmt: skip
        self.page_size, self.max_pages = page_size, max_pages
        pages = -(-capacity // page_size) * batch
        if max_pages is not None and pages > max_pages:
            raise ValueError(
                f"a capacity of {capacity} tokens needs {pages} pages, max_pages is {max_pages}"
            )
        pools = [_Pool(self.sizes, page_size, pages, max_pages) for _ in range(layers)]
        self._adopt(pools, [[[] for _ in range(batch)] for _ in range(layers)])

    def view(self, layer: int) -> CacheView:
        """Return the layer's pages, its page table and its length."""
        pool, length = self._pools[layer], self._physical[layer]
        seqlens = self._lengths_tensor(length)
        return CacheView(pool.k, pool.v, seqlens, length, self._table_tensor(layer))

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return ``(k, v)`` as ``[B, physical, Hkv, D]``, copied out of the pages."""
        pool, length = self._pools[layer], self._physical[layer]
        table = self._table_tensor(layer)[:, : -(-length // self.page_size)].long()
        k, v = (pages[table].flatten(1, 2)[:, :length] for pages in (pool.k, pool.v))
        return k, v

    def nbytes(self) -> int:
        """Return the bytes of the pages that this cache refers to, and of the side state."""
        pages = sum(len(row) for table in self._tables for row in table)
        return pages * self.page_size * self.sizes.token_bytes + self._auxiliary_bytes()

    def _adopt(self, pools: list[_Pool], tables: list[Table]) -> None:
        self._pools, self._tables = pools, tables
        self._table_tensors: list[Tensor | None] = [None] * len(tables)
        # a cache that is dropped gives its pages back to whoever shares the pool
        self._release = weakref.finalize(self, _release_pages, pools, tables)
        self._release.atexit = False

    def _table_tensor(self, layer: int) -> Tensor:
        tensor = self._table_tensors[layer]
        if tensor is None:
            tensor = torch.tensor(self._tables[layer], dtype=torch.int32)
            tensor = tensor.view(self.sizes.batch, -1).to(self.sizes.device)
            self._table_tensors[layer] = tensor
        return tensor

    def _write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        pool, table, size = self._pools[layer], self._tables[layer], self.page_size
        first, last = start // size, (start + k.shape[1] - 1) // size
        # a page that is begun, and that a fork also refers to, must be copied before it is written
        shared = [row for row in table if first < len(row) and pool.references[row[first]] > 1]
        pool.reserve(sum(last + 1 - len(row) for row in table) + len(shared))
        if shared or last >= len(table[0]):
            self._table_tensors[layer] = None
        for row in shared:
            page = pool.take()
            pool.k[page], pool.v[page] = pool.k[row[first]], pool.v[row[first]]
            pool.drop(row[first])
            row[first] = page
        for row in table:
            row += [pool.take() for _ in range(last + 1 - len(row))]
        self._store(pool, table, start, k, v)

    def _store(self, pool: _Pool, table: Table, start: int, k: Tensor, v: Tensor) -> None:
        size = self.page_size
        if k.shape[1] == 1:
            for row, k_row, v_row in zip(table, k, v, strict=True):
                pool.k[row[start // size], start % size] = k_row[0]
                pool.v[row[start // size], start % size] = v_row[0]
            return
        first = start // size
        pages = torch.tensor([row[first:] for row in table], device=self.sizes.device)
        slots = torch.arange(start - first * size, start - first * size + k.shape[1])
        slots = slots.to(self.sizes.device)
        flat = (pages[:, slots // size] * size + slots % size).flatten()
        pool.k.flatten(0, 1).index_copy_(0, flat, k.flatten(0, 1))
        pool.v.flatten(0, 1).index_copy_(0, flat, v.flatten(0, 1))

    def _truncate(self, layer: int, length: int) -> None:
        keep = -(-length // self.page_size)
        for row in self._tables[layer]:
            while len(row) > keep:
                self._pools[layer].drop(row.pop())
        self._table_tensors[layer] = None

    def _keep(self, layer: int, slots: Tensor) -> None:
        k, v = (
            t.gather(1, slots.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, t.shape[3]))
            for t in self.gather(layer)
        )
        self._truncate(layer, 0)
        if k.shape[1]:
            self._write(layer, 0, k, v)

    def _empty_like(self) -> Self:
        s = self.sizes
        return type(self)(
            s.layers, s.batch, s.kv_heads, s.head_dim, value_dim=s.value_dim, dtype=s.dtype,
            device=s.device, page_size=self.page_size, max_pages=self.max_pages,
        )  # fmt: skip

    def _share_with(self, other: Self) -> None:
        tables = [[list(row) for row in table] for table in self._tables]
        for pool, table in zip(self._pools, tables, strict=True):
            for page in (page for row in table for page in row):
                pool.references[page] += 1
        other._adopt(list(self._pools), tables)

    def _moved(self, layer: int, sizes: CacheSizes) -> tuple[_Pool, Table]:
        old, pages = self._pools[layer], [page for row in self._tables[layer] for page in row]
        pool = _Pool(sizes, self.page_size, len(pages), self.max_pages)
        pool.k[: len(pages)], pool.v[: len(pages)] = old.k[pages], old.v[pages]
        pool.references, pool.free = [1] * len(pages), []
        numbers = iter(range(len(pages)))
        return pool, [[next(numbers) for _ in row] for row in self._tables[layer]]

    def _adopt_moved(self, layers: list[tuple[_Pool, Table]]) -> None:
        self._release()
        self._adopt([pool for pool, _ in layers], [table for _, table in layers])


def _release_pages(pools: list[_Pool], tables: list[Table]) -> None:
    for pool, table in zip(pools, tables, strict=True):
        for row in table:
            while row:
                pool.drop(row.pop())
