"""When and how the Gluon forward kernel runs on Hopper."""

from __future__ import annotations

from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longctx_triton.kernels.flash_hopper import ROWS, flash_hopper_kernel
from longctx_triton.kernels.widen import widen_kernel
from longctx_triton.launch.device import Device
from longctx_triton.launch.prepared import Block, Launches, Prepared
from longctx_triton.launch.scratch import Pieces, scratch
from longctx_triton.launch.sizes import heads_in_cache
from longctx_triton.launch.tile_order import causal_section
from longctx_triton.launch.tuning import tuned
from longctx_triton.launch.widen import widening

__all__ = [
    "HopperTiles",
    "copyable",
    "even",
    "hopper_forward",
    "hopper_tiles",
    "rows_block",
]

_FP8 = torch.float8_e4m3fn
_DTYPES = (torch.bfloat16, torch.float16, _FP8)


class HopperTiles(NamedTuple):
    """Sizes of the kernel's tiles.

    Attributes
    ----------
    consumers : int
        Warpgroups that multiply, of 64 query rows each: 2 or 3.
    block_k : int
        Keys of one block, a power of two.
    stages : int
        Blocks of keys and values in flight.
    registers : int
        Registers of a thread of a consumer.
    ping_pong : bool
        Whether the consumers take turns at the tensor cores.
    """

    consumers: int
    block_k: int
    stages: int
    registers: int
    ping_pong: bool


@tuned("flash_hopper")
def hopper_tiles(head_dim: int, fp8: bool) -> HopperTiles:
    """Return the tiles for a head size of 64 or 128 and for queries and keys in fp8 or not."""
    if head_dim == 64 and not fp8:
        return HopperTiles(3, 64, 4, 160, False)
    return HopperTiles(2, 128, 3 if fp8 else 2, 240, False)


def hopper_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    right: int | None,
    sinks: Tensor | None,
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    scale: float,
) -> bool:
    """Write ``out`` and ``lse`` of attention without left window, softcap or packed sequences.

    Parameters
    ----------
    device : Device
    q, k, v : Tensor, (batch, seq, heads, head_dim)
        Values in fp8 are widened to fp16, which holds them exactly, so that the weights need not
        be rounded to fp8.
    out, lse : Tensor
        Contiguous, ``(batch, q_len, q_heads, head_dim)`` and ``(batch, q_heads, q_len)`` fp32.
    right : int or None
        0 for causal attention, None for full.
    sinks : Tensor, (q_heads,), float32, optional
    descales : tuple of Tensor, (batch, kv_heads), float32, optional
        Of q, k and v, at least 0.
    scale : float

    Returns
    -------
    bool
        Whether it ran: for head sizes 64 and 128, where every query sees a key, and addresses and
        strides are the multiples of 16 bytes that the copy engine wants.
    """
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return False
    dtype = q.dtype
    plan = _plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), dtype,
        right, sinks is not None, scale, device,
    )  # fmt: skip
    if plan is None:
        return False
    attend, widened, memory = plan
    if widened is None:
        attend(flash_hopper_kernel, q, k, v, out, lse, sinks, None, None, None)
    else:
        factors = [None if t is None else t.contiguous() for t in descales]
        (wide,) = scratch(q, memory)
        kernels = (widen_kernel, flash_hopper_kernel)
        widened(kernels, q, k, v, sinks, *factors, wide, out, lse)
    return True


class _Plan(NamedTuple):
    """Launches of one call.

    Attributes
    ----------
    attend : Prepared
    widened : Launches or None
        The same after ``widen_kernel``, with the fp8 values and their copy for the values.
    memory : Pieces
        Of the copy.
    """

    attend: Prepared
    widened: Launches | None
    memory: Pieces


@lru_cache(maxsize=512)
def _plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    right: int | None,
    sinks: bool,
    scale: float,
    device: Device,
) -> _Plan | None:
    """Return the launch, or None for what the kernel does not take."""
    unit = 16 // dtype.itemsize
    if not (
        dtype in _DTYPES
        and q_shape[3] == v_shape[3]
        and q_shape[3] in (64, 128)
        and (right is None or (right == 0 and k_shape[1] >= q_shape[1]))
        and k_shape[1] > 0
        and scale > 0
        and even(q_shape, q_strides, unit)
        and even(k_shape, k_strides, unit)
        and even(v_shape, v_strides, unit)
    ):
        return None
    fp8 = dtype == _FP8
    batch, q_len, q_heads, head_dim = q_shape
    tiles = hopper_tiles(head_dim, fp8)
    count, units = -(-q_len // (tiles.consumers * ROWS)), batch * q_heads
    out_strides = (q_len * q_heads * head_dim, q_heads * head_dim, head_dim, 1)
    group = q_heads // k_shape[2]
    # query heads whose keys and values fit the cache go together
    fitting = heads_in_cache(device.l2, k_shape[1], 2 * head_dim * dtype.itemsize)
    section = min(units, group * fitting)
    if right == 0:
        section = causal_section(count, units, group, fitting, device.processors)
    given = v_strides
    if fp8:  # the values are a contiguous copy
        v_strides = (k_shape[1] * k_shape[2] * head_dim, k_shape[2] * head_dim, head_dim, 1)
    narrow = 1 if fp8 else 2
    attend = Prepared(
        (min(count * units, device.processors),),
        (scale, count, units, section, q_heads, group, q_len, k_shape[1]),
        {
            "CONSUMERS": tiles.consumers, "BLOCK_K": tiles.block_k, "HEAD_DIM": head_dim,
            "VALUE_DIM": head_dim, "STAGES": tiles.stages, "CAUSAL": right == 0,
            "HAS_SINKS": sinks, "PING_PONG": tiles.ping_pong,
            "REGISTERS": tiles.registers, "num_warps": 4,
        },
        (
            rows_block(q_shape, q_strides, ROWS, narrow),
            rows_block(k_shape, k_strides, tiles.block_k, narrow),
            rows_block(k_shape, v_strides, tiles.block_k, 2),
            rows_block(q_shape, out_strides, ROWS, 2),
        ),
    )  # fmt: skip
    if not fp8:
        return _Plan(attend, None, ())
    widen, memory = widening(v_shape, given)
    widened = Launches((widen, (2, 7)), (attend, (0, 1, 7, 8, 9, 3, 4, 5, 6)), given=7)
    return _Plan(attend, widened, memory)


def copyable(t: Tensor) -> bool:
    """Return whether the copy engine can move ``[B, S, H, D]``: multiples of 16 bytes."""
    return t.data_ptr() % 16 == 0 and even(t.shape, t.stride(), 16 // t.element_size())


@lru_cache(maxsize=512)
def even(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> bool:
    """Return whether the strides of axes with several entries are multiples of a unit."""
    return all(
        size == 1 or (stride > 0 and stride % unit == 0)
        for size, stride in zip(shape[:3], strides[:3], strict=True)
    )


def rows_block(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: int, itemsize: int
) -> Block:
    """Describe blocks ``[1, rows, 1, head_dim]`` of ``[B, S, H, D]`` to the copy engine."""
    head_dim = shape[3]
    # the stride of an axis with one entry is never used and may be odd
    used = [
        head_dim if size == 1 else stride
        for size, stride in zip(shape[:3], strides[:3], strict=True)
    ]
    return Block(shape, (*used, 1), (1, rows, 1, head_dim), _DESCRIPTORS[itemsize])


def _descriptor(
    itemsize: int, tensor: Tensor, shape: list[int], strides: list[int], block_shape: list[int]
) -> TensorDescriptor:
    layout = _layout(block_shape[3] * itemsize, 8 * itemsize)
    return TensorDescriptor(tensor, shape, strides, block_shape, layout)


_DESCRIPTORS = {itemsize: partial(_descriptor, itemsize) for itemsize in (1, 2)}


@cache
def _layout(row_bytes: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(
        swizzle_byte_width=min(row_bytes, 128), element_bitwidth=bits, rank=4
    )
