"""When and how windows, blocks of positions and lists of key blocks run on Hopper."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_triton.kernels.flash_hopper import ROWS
from longctx_triton.kernels.key_walk_hopper import key_walk_hopper_kernel
from longctx_triton.kernels.walk_list import walk_list_kernel
from longctx_triton.launch.device import Device
from longctx_triton.launch.flash_hopper import even, rows_block
from longctx_triton.launch.prepared import Launches, Prepared
from longctx_triton.launch.scratch import Pieces, scratch
from longctx_triton.launch.sizes import heads_in_cache
from longctx_triton.launch.tile_order import keys_at_work
from longctx_triton.launch.tuning import tuned

__all__ = ["WalkTiles", "block_list_forward", "key_range_forward", "walk_tiles"]

_HALF = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
_TILE = 2 * ROWS


class WalkTiles(NamedTuple):
    """Sizes of the kernel's tiles.

    Attributes
    ----------
    block_k : int
        Keys of one step, a power of two.
    stages : int
        Steps of keys in flight; of values there is one more.
    registers : int
        Registers of a thread of the second consumer.
    """

    block_k: int
    stages: int
    registers: int


@tuned("key_walk")
def walk_tiles(head_dim: int, most_keys: int) -> WalkTiles:
    """Return the tiles for a head size of 64 or 128 and steps of up to 64 or 128 keys."""
    if most_keys < 128:
        return WalkTiles(64, 4, 240)
    return WalkTiles(128, 2 if head_dim == 128 else 3, 240)


def key_range_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window: int = 0,
    anchor: int = 0,
    last_queries: int = 0,
    head_windows: Tensor | None = None,
    block: int | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """Write ``out`` and ``lse`` of first keys and one run of keys that ends with the query.

    Parameters
    ----------
    device : Device
    q, k, v : Tensor, (batch, seq, heads, head_dim)
    out, lse : Tensor
        Contiguous, ``(batch, q_len, q_heads, head_dim)`` and ``(batch, q_heads, q_len)`` fp32.
    scale : float
    window : int
        Earlier keys of the run.
    anchor : int
        First keys that every query sees.
    last_queries : int
        Last query rows that see everything.
    head_windows : Tensor, (q_heads,), int32, optional
        Overrides ``window``.
    block : int, optional
        The run begins where the query's block of so many positions does, whatever ``window``.
    sinks : Tensor, (q_heads,), float32, optional

    Returns
    -------
    bool
        Whether it ran: not for other types and head sizes than the kernel has, nor with blocks
        that tiles of 128 rows would straddle, or whose first tile would begin before the queries.
    """
    if block is not None and block % _TILE and block < k.shape[1]:
        return False
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return False
    plan = _range_plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, scale, device,
        window, anchor, last_queries, block, head_windows is not None, sinks is not None,
    )  # fmt: skip
    if plan is None:
        return False
    plan(key_walk_hopper_kernel, q, k, v, out, lse, sinks, head_windows, None, None)
    return True


def block_list_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> bool:
    """Write ``out`` and ``lse`` of listed key blocks; arguments as the primitive's.

    Returns
    -------
    bool
        Whether it ran: for the types and head sizes of the kernel, key blocks of multiples of 64,
        and query blocks of multiples of 128 or, where heads share lists in pairs, of 64.
    """
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return False
    plan = _list_plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, scale, device,
        counts.shape[1], counts.stride(), indices.stride(), indices.shape[3],
        block_q, block_k, causal,
    )  # fmt: skip
    if plan is None:
        return False
    launches, memory = plan
    kernels = (walk_list_kernel, key_walk_hopper_kernel)
    launches(kernels, q, k, v, counts, indices, out, lse, *scratch(q, memory), None)
    return True


class _ListPlan(NamedTuple):
    """Launches of ``walk_list_kernel`` and of the attention, and the memory of the walks.

    The launches take q, k, v, counts, indices, the results, that memory, and None for what only
    other calls of the attention give.
    """

    launches: Launches
    memory: Pieces


@lru_cache(maxsize=512)
def _range_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    scale: float,
    device: Device,
    window: int,
    anchor: int,
    last_queries: int,
    block: int | None,
    head_windows: bool,
    sinks: bool,
) -> Prepared | None:
    """Return the launch, or None for what the kernel does not take."""
    q_len, k_len = q_shape[1], k_shape[1]
    straddled = block is not None and (
        (block < k_len and block % _TILE) or (k_len - q_len) % _TILE
    )
    layout = (q_shape, q_strides, k_shape, k_strides, v_shape, v_strides)
    if straddled or not _takes(*layout, dtype, scale):
        return None
    sizes = walk_tiles(q_shape[3], 128)
    origin, first_tile, tiles_a_block, tiles = k_len - q_len, 0, 1, -(-q_len // _TILE)
    if block is None:
        span, tiles_a_block = q_len, tiles
    else:
        span = min(block, k_len)
        tiles_a_block = -(-span // _TILE)
        origin = (k_len - q_len) // span * span
        first_tile = (k_len - q_len - origin) // _TILE
        tiles = -(-(k_len - origin) // _TILE) - first_tile
    keys = k_len
    if block is None and not head_windows:
        keys = keys_at_work(k_len, window, anchor)
    return _plan(
        q_shape, q_strides, k_shape, k_strides, v_strides, scale, device, tiles, 1, sizes,
        (origin, first_tile, span, tiles_a_block, min(anchor, span if block else k_len),
         min(window, k_len), min(last_queries, q_len), 1, 1, 1),
        from_list=False, causal=True, by_block=block is not None,
        head_windows=head_windows, sinks=sinks, keys=keys,
    )  # fmt: skip


@lru_cache(maxsize=512)
def _list_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    scale: float,
    device: Device,
    sets: int,
    count_strides: tuple[int, ...],
    index_strides: tuple[int, ...],
    capacity: int,
    block_q: int,
    block_k: int,
    causal: bool,
) -> _ListPlan | None:
    """Return the launches, or None for what the kernel does not take."""
    batch, q_len, q_heads, _ = q_shape
    k_len, kv_heads = k_shape[1:3]
    pair = block_q % _TILE != 0 and block_q < q_len
    if (
        block_k % 64
        or capacity == 0
        or not _takes(q_shape, q_strides, k_shape, k_strides, v_shape, v_strides, dtype, scale)
        or (pair and (block_q % ROWS or q_heads // kv_heads % 2 or q_heads // sets % 2))
    ):
        return None
    sizes = walk_tiles(q_shape[3], 128 if block_k % 128 == 0 else 64)
    heads, rows = (2, ROWS) if pair else (1, _TILE)
    tiles, each = -(-q_len // rows), block_k // sizes.block_k
    room = max(1, min(capacity * each, -(-k_len // sizes.block_k)))
    walks = batch * sets * tiles
    lists = Prepared(
        (walks,),
        (*count_strides, *index_strides, sets, tiles, q_len, k_len, capacity, room, block_q,
         rows, each),
        {
            "BLOCK_K": sizes.block_k, "ENTRIES": 256, "BINS": 1024, "CAUSAL": causal,
            "num_warps": 4,
        },
    )  # fmt: skip
    attend = _plan(
        q_shape, q_strides, k_shape, k_strides, v_strides, scale, device, tiles, heads, sizes,
        (0, 0, 1, 1, 0, 0, 0, q_heads // sets, sets, room),
        from_list=True, causal=causal, by_block=False, head_windows=False, sinks=False, keys=k_len,
    )  # fmt: skip
    launches = Launches((lists, (3, 4, 7, 8)), (attend, (0, 1, 2, 5, 6, 9, 9, 7, 8)), given=5)
    return _ListPlan(launches, ((walks * room, torch.int32), (walks * 2, torch.int32)))


def _takes(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    scale: float,
) -> bool:
    """Return whether the kernel can run, whatever the plan: at addresses of 16 bytes' multiples.

    The copy engine wants strides in such multiples, too.
    """
    tensors = ((q_shape, q_strides), (k_shape, k_strides), (v_shape, v_strides))
    return (
        dtype in _HALF
        and q_shape[3] == v_shape[3]
        and q_shape[3] in HEAD_DIMS
        and k_shape[1] > 0
        and scale > 0
        and all(even(shape, strides, 16 // dtype.itemsize) for shape, strides in tensors)
    )


def _plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    scale: float,
    device: Device,
    tiles: int,
    heads: int,
    sizes: WalkTiles,
    numbers: tuple[int, ...],
    *,
    from_list: bool,
    causal: bool,
    by_block: bool,
    head_windows: bool,
    sinks: bool,
    keys: int,
) -> Prepared:
    """Return the launch; the cache should hold ``keys`` of a head."""
    batch, q_len, q_heads, head_dim = q_shape
    units, group = batch * q_heads // heads, q_heads // k_shape[2]
    # query heads whose keys and values fit the cache go together
    fitting = heads_in_cache(device.l2, keys, 4 * head_dim)
    section = min(batch * q_heads, group * fitting) // heads
    out_strides = (q_len * q_heads * head_dim, q_heads * head_dim, head_dim, 1)
    return Prepared(
        (min(tiles * units, device.processors),),
        (scale, tiles, units, max(1, section), q_heads, group, q_len, k_shape[1], *numbers),
        {
            "HEADS": heads, "BLOCK_K": sizes.block_k, "HEAD_DIM": head_dim,
            "STAGES": sizes.stages, "LIST": from_list, "CAUSAL": causal, "BY_BLOCK": by_block,
            "HEAD_WINDOWS": head_windows, "HAS_SINKS": sinks,
            "REGISTERS": sizes.registers, "num_warps": 4,
        },
        (
            rows_block(q_shape, q_strides, ROWS, 2),
            rows_block(k_shape, k_strides, sizes.block_k, 2),
            rows_block(k_shape, v_strides, sizes.block_k, 2),
            rows_block(q_shape, out_strides, ROWS, 2),
        ),
    )  # fmt: skip
