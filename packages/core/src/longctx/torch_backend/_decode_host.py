"""Decode with lengths known on the host: slices of the cache, whole pieces without masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor

from longctx.torch_backend._decode_piece import attend_keys, visible
from longctx.torch_backend._fp8 import widen
from longctx.torch_backend._merge import merge_pair, merge_parts
from longctx.torch_backend._sdpa import attend

__all__ = ["decode_on_host"]

Pair = tuple[Tensor, Tensor]
Read = Callable[[int, int], Iterator[Pair]]

_PIECE = 1024  # keys that one thread works on: long caches spread over the cores
_COPY_BYTES = 2**21  # gathered or widened keys and values: written and read back within the cache
_LEAST_COPY = 64  # keys


def decode_on_host(
    rows: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    *,
    q_len: int,
    left: int | None,
    softcap: float,
    scale: float,
) -> Pair:
    """Return ``(out [B, R, Hkv, Dv], lse [B, Hkv, R])``, wide, of ``rows [B, R, Hkv, D]``.

    Row ``r`` belongs to query ``r % q_len``.
    """
    lengths = cache_seqlens.tolist()
    options = (q_len, left, softcap, scale)
    plain = page_table is None and k_cache.dtype == rows.dtype
    if plain and len(set(lengths)) == 1:
        return _sequences(rows, _slices(k_cache, v_cache), lengths[0], *options)
    parts = []
    for b, length in enumerate(lengths):
        caches = (k_cache, v_cache) if page_table is not None else (k_cache[b], v_cache[b])
        if plain:
            read = _slices(*(t.unsqueeze(0) for t in caches))
        else:
            table = None if page_table is None else page_table[b].tolist()
            read = _copies(*caches, table, rows.dtype)
        parts.append(_sequences(rows[b : b + 1], read, length, *options))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _sequences(
    rows: Tensor,
    read: Read,
    length: int,
    q_len: int,
    left: int | None,
    softcap: float,
    scale: float,
) -> Pair:
    """Attend in sequences of one length: keys that every query sees, then the few at the edges."""
    first = length - q_len  # position of the first query
    begin, shared = (0, 0) if left is None else (max(0, p - left) for p in (first, length - 1))
    edges = [(begin, shared), (first + 1, length)] if shared <= first else [(begin, length)]
    parts = []
    if shared <= first:
        parts = [_unmasked(rows, k, v, softcap, scale) for k, v in read(shared, first + 1)]
    edges = [edge for edge in edges if edge[0] < edge[1]]
    if edges:
        pieces = [piece for edge in edges for piece in read(*edge)]
        keys, values = (torch.cat(tensors, 1) for tensors in zip(*pieces, strict=True))
        slots = torch.cat([torch.arange(*edge) for edge in edges])
        ends = torch.full((rows.shape[0],), length)
        seen = visible(slots, ends, q_len, left)
        parts.append(attend_keys(rows, keys, values, seen, softcap=softcap, scale=scale))
    return reduce(merge_pair, parts)


def _unmasked(rows: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float) -> Pair:
    """Attend to keys ``[N, n, Hkv, D]`` that every row sees."""
    sequences, keys, kv_heads, head_dim = k.shape
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if softcap or head_dim != v.shape[3]:
        width = kv_heads * (head_dim + v.shape[3] + 2 * rows.shape[1])
        step = max(_LEAST_COPY, _COPY_BYTES // (4 * sequences * width))
        parts = [
            attend_keys(rows, *pair, None, softcap=softcap, scale=scale)
            for pair in zip(torch.split(k, step, 1), torch.split(v, step, 1), strict=True)
        ]
        return reduce(merge_pair, parts)
    if keys < 2 * _PIECE:
        out, lse = attend(rows, k, v, causal=False, scale=scale)
        return out.to(wide), lse
    if sequences > 1:
        each = [
            _unmasked(rows[b : b + 1], k[b : b + 1], v[b : b + 1], softcap, scale)
            for b in range(sequences)
        ]
        return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each])
    count = keys // _PIECE
    body = count * _PIECE
    k_body, v_body = (torch.unflatten(t[0, :body], 0, (count, _PIECE)) for t in (k, v))
    outs, lses = attend(rows.expand(count, -1, -1, -1), k_body, v_body, causal=False, scale=scale)
    out, lse = merge_parts(outs.to(wide), lses.transpose(1, 2))
    merged = out.unsqueeze(0), lse.transpose(0, 1).unsqueeze(0)
    if body == keys:
        return merged
    return merge_pair(merged, _unmasked(rows, k[:, body:], v[:, body:], softcap, scale))


def _slices(k_cache: Tensor, v_cache: Tensor) -> Read:
    """Read from contiguous caches ``[N, capacity, Hkv, D]`` without copying."""

    def read(begin: int, end: int) -> Iterator[Pair]:
        yield k_cache[:, begin:end], v_cache[:, begin:end]

    return read


def _copies(k_cache: Tensor, v_cache: Tensor, pages: list[int] | None, dtype: torch.dtype) -> Read:
    """Read one sequence through its pages, or from an fp8 cache, in copies of a bounded size.

    Pages that lie one behind the other are read in place, unless they must be widened.
    """
    row_bytes = v_cache.shape[-2] * (k_cache.shape[-1] + v_cache.shape[-1]) * dtype.itemsize
    most = max(_LEAST_COPY, _COPY_BYTES // row_bytes)

    def read(begin: int, end: int) -> Iterator[Pair]:
        while begin < end:
            if pages is None:
                stop = min(end, begin + most)
                pair = tuple(t[begin:stop] for t in (k_cache, v_cache))
            else:
                stop, pair = _through_pages(k_cache, v_cache, pages, begin, end, most)
            if pair[0].dtype != dtype:
                stop = min(stop, begin + most)
                pair = tuple(widen(t[: stop - begin], dtype) for t in pair)
            yield pair[0].unsqueeze(0), pair[1].unsqueeze(0)
            begin = stop

    return read


def _through_pages(
    k_cache: Tensor, v_cache: Tensor, pages: list[int], begin: int, end: int, most: int
) -> tuple[int, tuple[Tensor, ...]]:
    """Return the slot after those read, and keys and values from ``begin`` to there."""
    size = k_cache.shape[1]
    page, last = begin // size, -(-end // size)
    run = page + 1
    while run < last and pages[run] == pages[run - 1] + 1:
        run += 1
    if (run - page) * size >= _PIECE or run == last:
        found = tuple(t[pages[page] : pages[page] + run - page] for t in (k_cache, v_cache))
    else:
        run = min(last, page + max(1, most // size))
        numbers = torch.tensor(pages[page:run])
        found = tuple(t.index_select(0, numbers) for t in (k_cache, v_cache))
    stop = min(end, run * size)
    offset = page * size
    return stop, tuple(t.flatten(0, 1)[begin - offset : stop - offset] for t in found)
