"""What a decode call launches, from its shapes alone."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from longctx_triton.launch.decode_splits import split_keys
from longctx_triton.launch.device import Device
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.tuning import tuned

__all__ = ["DecodePlan", "decode_plan"]

FP8 = torch.float8_e4m3fn
FAR = 1 << 30
"""A window so wide that no key is outside; the kernels count in 32 bits."""
TILE_BYTES = 16 << 10
"""Bytes of one key tile: two stages of keys and values in flight saturate a multiprocessor."""
MERGED_BYTES = 1 << 18
"""Partial results of one tile that the last of its programs merges; more take another kernel."""
MERGED_NUMBERS = 64
"""Of partial results that a thread of it holds at a time."""
MOST_MERGED = 8192
"""Of them, that a program holds: two times as many are on their way to shared memory."""


class _Tiles(NamedTuple):
    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int
    programs: int  # a multiprocessor


class DecodePlan(NamedTuple):
    """Launches of one decode call.

    Attributes
    ----------
    attend : Prepared
        Of ``decode_kernel``.
    merge : Prepared or None
        Of ``merge_splits_kernel``; None where one program sees all keys of a row.
    parts : int
        Numbers, fp32, that the partial results take.
    counters : int
        Tiles whose programs are counted.
    bits : bool
        Whether the kernel reads an fp8 cache as bytes.
    """

    attend: Prepared
    merge: Prepared | None
    parts: int
    counters: int
    bits: bool


@lru_cache(maxsize=512)
def decode_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    cache_dtype: torch.dtype,
    pages: int | None,
    page_stride: int,
    window_left: int | None,
    softcap: float,
    scale: float,
    device: Device,
) -> DecodePlan:
    """Return the launches; remembered, as a model repeats its shapes.

    Parameters
    ----------
    q_shape, q_strides, k_shape, k_strides, v_shape, v_strides : tuple of int
        Of the queries and of the caches.
    cache_dtype : torch.dtype
    pages : int or None
        Width of the page table, if there is one.
    page_stride : int
        From one of its rows to the next.
    window_left : int or None
    softcap, scale : float
    device : Device
    """
    batch, q_len, heads, head_dim = q_shape
    kv_heads, value_dim = v_shape[2:]
    group = heads // kv_heads
    rows = group * q_len
    page_size, capacity = 0, k_shape[1]
    if pages is not None:
        page_size, capacity = k_shape[1], pages * k_shape[1]
    tiles = _tiles(rows, head_dim, value_dim, cache_dtype.itemsize, pages is not None, device)
    fp8 = ""
    if cache_dtype == FP8:
        fp8 = _fp8_mode(device)
    reach, left = capacity, 0
    if window_left is not None:
        left = min(window_left, FAR)
        # a window's first and last block may both be partly outside
        reach = min(capacity, left + q_len + tiles.block_n)
    row_blocks = -(-rows // tiles.block_m)
    units = batch * kv_heads * row_blocks
    slots = tiles.programs * device.processors
    splits, least_blocks = split_keys(units, -(-reach // tiles.block_n), slots)
    windowed = window_left is not None
    block_rows = min(tiles.block_m, padded(rows, 1))
    numbers = block_rows * tiles.block_v
    merged_parts = 0
    if splits > 1 and 4 * splits * numbers <= MERGED_BYTES:
        merged_parts = min(MOST_MERGED, MERGED_NUMBERS * 32 * tiles.num_warps) // numbers
    attend = Prepared(
        (row_blocks * kv_heads, splits, batch),
        (
            scale, softcap, left, q_len, kv_heads, splits, least_blocks, batch,
            *q_strides[:3], *k_strides[:3], *v_strides[:3], page_stride,
        ),
        {
            "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
            "BLOCK_D": tiles.block_d, "BLOCK_V": tiles.block_v,
            "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "GROUP": group,
            "ROWS": block_rows, "PAGE_SIZE": page_size, "FP8": fp8, "HAS_WINDOW": windowed,
            "HAS_SOFTCAP": softcap > 0, "SPLIT": splits > 1, "MERGED_PARTS": merged_parts,
            "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
        },
    )  # fmt: skip
    if splits == 1:
        return DecodePlan(attend, None, 0, 0, fp8 == "bits")
    if merged_parts:
        parts = (units * splits + merged_parts) * (numbers + max(block_rows, 4))
        return DecodePlan(attend, None, parts, units, fp8 == "bits")
    parts = splits * batch * heads * q_len * (value_dim + 1)
    merge = Prepared(
        (heads * q_len, batch),
        (left, q_len, heads, splits, least_blocks, batch),
        {
            "VALUE_DIM": value_dim, "BLOCK_V": tiles.block_v, "BLOCK_N": tiles.block_n,
            "BLOCK_S": min(16, padded(splits, 2)), "HAS_WINDOW": windowed, "num_warps": 4,
        },
    )  # fmt: skip
    return DecodePlan(attend, merge, parts, 0, fp8 == "bits")


def _fp8_mode(device: Device) -> str:
    """Return how an fp8 cache is read: as bits where the GPU cannot convert."""
    return "bits" if device.arch < (8, 9) else "native"


@tuned("decode", apart=("rows",))
def _tiles(
    rows: int, head_dim: int, value_dim: int, itemsize: int, paged: bool, device: Device
) -> _Tiles:
    block_d, block_v = (padded(d) for d in (head_dim, value_dim))
    widest = max(block_d, block_v)
    most = 128 if widest <= 128 else 64
    block_m = min(most, padded(rows))
    block_n = max(16, min(128 if block_m == 16 else 64, TILE_BYTES // (widest * itemsize)))
    if device.interpreted:  # the interpreter: several blocks for short caches too
        return _Tiles(16, 16, block_d, block_v, 1, 1, 2)
    # tiles in flight; behind page numbers, which are loaded ahead, Triton counts one stage more
    deep = device.arch[0] == 9 and block_m == 16 and itemsize == 2
    stages = 5 if paged else 4 if deep else 3
    if not device.large_shared:
        stages = 2
    if deep and not paged and widest == 128:
        return _Tiles(block_m, 128, block_d, block_v, 4, 3, 1)
    num_warps = 8 if block_m == 128 or (block_m == 64 and widest == 256) else 4
    return _Tiles(block_m, block_n, block_d, block_v, num_warps, stages, 2)
