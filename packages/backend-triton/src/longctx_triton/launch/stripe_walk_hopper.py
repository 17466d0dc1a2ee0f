"""When and how key columns and diagonals run on Hopper."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_triton.kernels.flash_hopper import ROWS
from longctx_triton.kernels.stripe_tables import stripe_tables_kernel
from longctx_triton.kernels.stripe_walk_hopper import stripe_walk_hopper_kernel
from longctx_triton.launch.device import Device
from longctx_triton.launch.flash_hopper import even, rows_block
from longctx_triton.launch.prepared import Launches, Prepared
from longctx_triton.launch.scratch import Pieces, scratch
from longctx_triton.launch.sizes import heads_in_cache
from longctx_triton.launch.tuning import tuned

__all__ = ["StripeWalkTiles", "stripe_walk_forward", "stripe_walk_tiles"]

_HALF = (torch.bfloat16, torch.float16)
_TILE = 2 * ROWS
ENTRIES = 1024
"""Stripes that the tables take at a time."""
CHUNK = 32
"""Groups of 128 keys that they take at a time."""
COPIED = 256
"""Columns that they copy at a time."""
MOST_COPIED = 8 << 20
"""Bytes of columns that are copied to memory that is kept; more of them are allocated."""


class StripeWalkTiles(NamedTuple):
    """Sizes of the kernel, whose tiles are squares of 128.

    Attributes
    ----------
    stages : int
        Steps of keys and of values in flight.
    registers : int
        Registers of a thread of the second consumer.
    """

    stages: int
    registers: int


@tuned("stripe_walk")
def stripe_walk_tiles(head_dim: int) -> StripeWalkTiles:
    """Return the sizes for a head size of 64 or 128."""
    return StripeWalkTiles(2 if head_dim == 128 else 3, 240)


class _Plan(NamedTuple):
    """What a call takes but for its tensors.

    Attributes
    ----------
    launches : Launches
        Of the kernels that make the tables and the result: of q, k, v, the stripes, the results,
        and what the kernels keep between them.
    memory : Pieces
        Of the bitmaps, as numbers of 32 and of 64 bits, of the lists, and of the columns if they
        are few.
    columns : int
        Numbers of the columns' copies where they are many.
    """

    launches: Launches
    memory: Pieces
    columns: int


def stripe_walk_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    vertical: Tensor,
    vertical_counts: Tensor,
    slash: Tensor,
    slash_counts: Tensor,
    *,
    scale: float,
) -> bool:
    """Write ``out`` and ``lse`` of columns and diagonals; arguments as the primitive's.

    The keys and values of the columns are copied, once for each set of stripes or each KV head,
    whichever are more.

    Returns
    -------
    bool
        Whether it ran: for the types and head sizes of the kernel, and a positive scale.
    """
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return False
    dtype = q.dtype
    plan = _plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), dtype,
        vertical.shape, vertical.stride(), vertical_counts.stride(0),
        slash.shape[2], slash.stride(), slash_counts.stride(0), scale, device,
    )  # fmt: skip
    if plan is None:
        return False
    kept = scratch(q, plan.memory)
    if plan.columns:
        kept = (*kept, q.new_empty(plan.columns))
    kernels = (stripe_tables_kernel, stripe_walk_hopper_kernel)
    plan.launches(
        kernels, q, k, v, vertical, vertical_counts, slash, slash_counts, out, lse, *kept
    )
    return True


@lru_cache(maxsize=512)
def _plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    vertical_shape: tuple[int, ...],
    vertical_strides: tuple[int, ...],
    vertical_count_stride: int,
    n_slash: int,
    slash_strides: tuple[int, ...],
    slash_count_stride: int,
    scale: float,
    device: Device,
) -> _Plan | None:
    """Return the launches, or None for what the kernel does not take."""
    batch, q_len, q_heads, head_dim = q_shape
    tensors = ((q_shape, q_strides), (k_shape, k_strides), (v_shape, v_strides))
    if not (
        dtype in _HALF
        and head_dim == v_shape[3]
        and head_dim in (64, 128)
        and k_shape[1] > 0
        and scale > 0
        and all(even(shape, strides, 16 // dtype.itemsize) for shape, strides in tensors)
    ):
        return None
    sizes = stripe_walk_tiles(head_dim)
    k_len, kv_heads = k_shape[1:3]
    _, sets, n_vertical = vertical_shape
    groups, capacity = -(-k_len // _TILE) + 1, max(1, min(n_vertical, k_len))
    words, s_list, copies = 4 * (groups + 1), capacity + 6 * groups, max(sets, kv_heads)
    tiles, units, group = -(-q_len // _TILE), batch * q_heads, q_heads // kv_heads
    # query heads whose keys and values fit the cache go together
    section = min(units, group * heads_in_cache(device.l2, k_len, 4 * head_dim))
    out_strides = (q_len * q_heads * head_dim, q_heads * head_dim, head_dim, 1)
    columns = (2 * batch, capacity, copies, head_dim)
    column_strides = (copies * capacity * head_dim, head_dim, capacity * head_dim, 1)
    eights = [stride // 8 for stride in (*k_strides[:3], *v_strides[:3])]
    tables = Prepared(
        (batch * copies,),
        (*vertical_strides[:2], vertical_count_stride, *slash_strides[:2], slash_count_stride,
         *eights, copies, copies // sets, copies // kv_heads, k_len, groups, n_vertical, n_slash,
         capacity, s_list),
        {
            "D": head_dim, "ENTRIES": ENTRIES, "CHUNK": CHUNK, "ROWS": COPIED, "num_warps": 8,
        },
    )  # fmt: skip
    attend = Prepared(
        (min(tiles * units, device.processors),),
        (scale, tiles, units, section, q_heads, group, q_heads // copies, batch, q_len, k_len,
         copies, q_heads // copies, groups, capacity, s_list),
        {
            "HEAD_DIM": head_dim, "STAGES": sizes.stages,
            "REGISTERS": sizes.registers, "num_warps": 4,
        },
        (
            rows_block(q_shape, q_strides, ROWS, 2),
            rows_block(k_shape, k_strides, _TILE, 2),
            rows_block(k_shape, v_strides, _TILE, 2),
            rows_block(q_shape, out_strides, ROWS, 2),
            rows_block(columns, column_strides, _TILE, 2),
        ),
    )  # fmt: skip
    memory: Pieces = (
        (batch * copies * 4 * words, torch.int32, torch.int64),
        (batch * copies * s_list, torch.int32),
    )
    copied = math.prod(columns)
    few = copied * dtype.itemsize <= MOST_COPIED
    if few:
        memory = (*memory, (copied, dtype))
    bits, wide, listed, copied_to = range(9, 13)
    launches = Launches(
        (tables, (bits, listed, copied_to, 3, 4, 5, 6, 1, 2)),
        (attend, (0, 1, 2, 7, copied_to, 8, listed, wide)),
        given=7,
    )
    return _Plan(launches, memory, 0 if few else copied)
