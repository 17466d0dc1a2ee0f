"""When and how the Gluon kernel of absorbed MLA over lists runs on Hopper."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_triton.kernels.merge_parts import merge_parts
from longctx_triton.kernels.mla_hopper import HALF, HEADS, REST, latent_hopper_kernel
from longctx_triton.launch.prepared import Prepared

__all__ = ["LEAST_HEADS", "LatentTiles", "latent_forward", "latent_takes", "latent_tiles"]

LEAST_HEADS = 16
"""Query heads from which the kernel, which always multiplies 64, is the faster one."""

BLOCK = REST
"""Keys of a block: as many as channels that only scores read, whose place the weights take."""

_HALF_PRECISION = (torch.bfloat16, torch.float16)
_LOG2_E = 1.4426950408889634


class LatentTiles(NamedTuple):
    """Sizes of the kernel's tiles.

    Attributes
    ----------
    stages : int
        Blocks of keys in flight; memory holds two.
    value_registers, gather_registers : int
        Registers of a thread that multiplies values, and of one that copies.
    """

    stages: int
    value_registers: int
    gather_registers: int


def latent_tiles() -> LatentTiles:
    """Return the tiles."""
    return LatentTiles(2, 168, 56)


def latent_takes(q: Tensor, k: Tensor, v: Tensor, page_size: int, scale: float) -> bool:
    """Return whether the kernel can run: single keys of 512 and 64 channels, one KV head.

    Copies are of 16 bytes, and the compiler knows as much of strides in multiples of 16.
    """
    return (
        q.shape[2] >= LEAST_HEADS
        and q.shape[3] == 2 * HALF + REST
        and v.shape[3] == 2 * HALF
        and k.shape[2] == 1
        and page_size == 1
        and scale > 0
        and k.data_ptr() == v.data_ptr()
        and k.stride() == v.stride()
        and q.dtype == k.dtype
        and q.dtype in _HALF_PRECISION
        and not any(
            extent % 16
            for extent in (q.data_ptr(), k.data_ptr(), *q.stride()[:3], *k.stride()[:2])
        )
    )


def latent_forward(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    sinks: Tensor | None,
    processors: int,
) -> None:
    """Write ``out`` and ``lse``; few tiles (decode) are cut over their lists and merged.

    Parameters
    ----------
    q, k : Tensor
        ``(batch, q_len, heads, 576)`` and ``(batch, k_len, 1, 576)``, as `latent_takes` accepts
        them.
    indices : Tensor, (batch, q_len, 1, slots), int32
    out, lse : Tensor
        Contiguous, ``(batch, q_len, heads, 512)`` and ``(batch, heads, q_len)`` fp32.
    scale : float
    sinks : Tensor, (heads,), float32, optional
    processors : int
        Programs to start, one a multiprocessor.
    """
    parts, attend, memory = _plan(
        q.shape, q.stride(), k.shape, k.stride(), indices.shape, indices.stride(), scale,
        sinks is not None, processors,
    )  # fmt: skip
    inputs = (q, k, indices, lse if sinks is None else sinks)
    if parts == 1:
        attend(latent_hopper_kernel, *inputs, out, lse)
        return
    numbers = torch.empty(sum(memory), dtype=torch.float32, device=q.device)
    part_out, part_lse = numbers.split_with_sizes(memory)
    attend(latent_hopper_kernel, *inputs, part_out, part_lse)
    merge_parts(parts, part_out, part_lse, sinks, out, lse)


@lru_cache(maxsize=512)
def _plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    indices_shape: tuple[int, ...],
    indices_strides: tuple[int, ...],
    scale: float,
    sinks: bool,
    processors: int,
) -> tuple[int, Prepared, tuple[int, int]]:
    """Return the number of parts, the launch, and how many numbers the parts' results take."""
    batch, q_len, heads, _ = q_shape
    slots = indices_shape[3]
    tiles = latent_tiles()
    head_tiles = -(-heads // HEADS)
    tokens = batch * q_len
    blocks = max(1, -(-slots // BLOCK))
    wanted = max(1, min(processors // (tokens * head_tiles), blocks // 2))
    span = -(-blocks // wanted) * BLOCK
    parts = max(1, -(-slots // span))
    total = parts * tokens * head_tiles
    attend = Prepared(
        (min(total, processors),),
        (
            *q_strides[:3], *k_strides[:2], *indices_strides[:2],
            total, tokens, q_len, k_shape[1], heads, head_tiles, slots, span, scale * _LOG2_E,
        ),
        {
            "BLOCK": BLOCK, "STAGES": tiles.stages, "LOOK": 512,
            "HAS_SINKS": sinks and parts == 1,
            "VALUE_REGISTERS": tiles.value_registers, "GATHER_REGISTERS": tiles.gather_registers,
            "num_warps": 4,
        },
    )  # fmt: skip
    return parts, attend, (parts * tokens * heads * 2 * HALF, parts * tokens * heads)
