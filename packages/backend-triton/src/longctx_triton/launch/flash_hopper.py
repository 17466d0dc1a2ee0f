"""When and how the Gluon forward kernel runs on Hopper."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longctx_triton.kernels.flash_hopper import ROWS, flash_hopper_kernel
from longctx_triton.launch.tuning import tuned

__all__ = ["HopperTiles", "hopper_forward", "hopper_takes", "hopper_tiles"]

_HALF = (torch.bfloat16, torch.float16)


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
        Whether two consumers take turns at the tensor cores.
    """

    consumers: int
    block_k: int
    stages: int
    registers: int
    ping_pong: bool


@tuned("flash_hopper")
def hopper_tiles(head_dim: int) -> HopperTiles:
    """Return the tiles for a head size of 64 or 128."""
    return HopperTiles(2, 128, 3 if head_dim == 64 else 2, 240, False)


def hopper_takes(q: Tensor, k: Tensor, v: Tensor, right: int | None, scale: float) -> bool:
    """Return whether the kernel can run; without window, softcap or packed sequences.

    ``right`` is 0 for causal attention and None for full. Every query must see a key, and the
    copy engine wants addresses and strides in multiples of 16 bytes.
    """
    return (
        q.dtype in _HALF
        and q.shape[3] == v.shape[3]
        and q.shape[3] in (64, 128)
        and (right is None or (right == 0 and k.shape[1] >= q.shape[1]))
        and k.shape[1] > 0
        and scale > 0
        and all(_copyable(t) for t in (q, k, v))
    )


def hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    sinks: Tensor | None,
    scale: float,
    section: int,
    processors: int,
) -> None:
    """Write ``out`` and ``lse``.

    Parameters
    ----------
    q, k, v : Tensor, (batch, seq, heads, head_dim)
        As `hopper_takes` accepts them.
    out, lse : Tensor
        Contiguous, ``(batch, q_len, q_heads, head_dim)`` and ``(batch, q_heads, q_len)`` fp32.
    causal : bool
    sinks : Tensor, (q_heads,), float32, optional
    scale : float
    section : int
        Query heads, over all batch entries, whose keys fit the L2 cache together.
    processors : int
        Programs to start, one a multiprocessor.
    """
    batch, q_len, q_heads, head_dim = q.shape
    tiles = hopper_tiles(head_dim)
    count, units = -(-q_len // (tiles.consumers * ROWS)), batch * q_heads
    flash_hopper_kernel[(min(count * units, processors),)](
        _described(q, ROWS), _described(k, tiles.block_k), _described(v, tiles.block_k),
        _described(out, ROWS), lse, sinks, scale, count, units, section,
        q_heads, q_heads // k.shape[2], q_len, k.shape[1],
        CONSUMERS=tiles.consumers, BLOCK_K=tiles.block_k, HEAD_DIM=head_dim,
        VALUE_DIM=head_dim, STAGES=tiles.stages, CAUSAL=causal, HAS_SINKS=sinks is not None,
        PING_PONG=tiles.ping_pong, REGISTERS=tiles.registers,
        num_warps=4,
    )  # fmt: skip


def _copyable(t: Tensor) -> bool:
    if t.data_ptr() % 16:
        return False
    # eight half-precision numbers are 16 bytes
    return all(
        size == 1 or (stride > 0 and stride % 8 == 0)
        for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)
    )


def _described(t: Tensor, rows: int) -> TensorDescriptor:
    """Describe blocks ``[1, rows, 1, head_dim]`` of ``[B, S, H, D]`` to the copy engine."""
    head_dim = t.shape[3]
    # the stride of an axis with one entry is never used and may be odd
    strides = [
        head_dim if size == 1 else stride
        for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)
    ]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, rows, 1, head_dim], _layout())


@cache
def _layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
