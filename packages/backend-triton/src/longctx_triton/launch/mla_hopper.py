"""When and how the Gluon kernel of absorbed MLA over lists runs on Hopper."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_triton.kernels.merge_parts import merge_parts_kernel, merge_plan
from longctx_triton.kernels.mla_hopper import HALF, HEADS, REST, latent_hopper_kernel
from longctx_triton.launch.prepared import Launches, Prepared
from longctx_triton.launch.scratch import Pieces, scratch

__all__ = [
    "LATENT",
    "LEAST_HEADS",
    "LatentTiles",
    "latent_forward",
    "latent_tiles",
]

LEAST_HEADS = 16
"""Query heads from which the kernel, which always multiplies 64, is the faster one."""

LATENT = 2 * HALF + REST
"""Channels of a key."""

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


class _Plan(NamedTuple):
    """Launches of one call.

    Attributes
    ----------
    attend : Prepared
        Over whole lists.
    merged : Launches or None
        Over parts of lists, and of merging them: of q, k, the lists, the sinks, the parts' results
        and log-sum-exps, and the results.
    memory : Pieces
        Of the parts' results and of their log-sum-exps.
    """

    attend: Prepared
    merged: Launches | None
    memory: Pieces


def latent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    *,
    page_size: int,
    scale: float,
    sinks: Tensor | None,
    processors: int,
) -> bool:
    """Write ``out`` and ``lse`` of attention over lists of single keys.

    Few tiles (decode) are cut over their lists and merged.

    Parameters
    ----------
    q, k, v : Tensor
        ``(batch, q_len, heads, 576)``, ``(batch, k_len, 1, 576)`` and the keys' first 512.
    out, lse : Tensor
        Contiguous, ``(batch, q_len, heads, 512)`` and ``(batch, heads, q_len)`` fp32.
    indices : Tensor, (batch, q_len, 1, slots), int32
    page_size : int
    scale : float
    sinks : Tensor, (heads,), float32, optional
    processors : int
        Programs to start, one a multiprocessor.

    Returns
    -------
    bool
        Whether it ran: for 512 and 64 channels of one KV head, whose values are its keys.
    """
    start, q_shape = k.data_ptr(), q.shape
    # copies are of 16 bytes
    if q_shape[2] < LEAST_HEADS or start != v.data_ptr() or (q.data_ptr() | start) % 16:
        return False
    plan = _plan(
        q_shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(),
        indices.shape, indices.stride(), page_size, scale, sinks is not None, processors,
    )  # fmt: skip
    if plan is None:
        return False
    attend, merged, memory = plan
    sunk = lse if sinks is None else sinks
    if merged is None:
        attend(latent_hopper_kernel, q, k, indices, sunk, out, lse)
    else:
        kernels = (latent_hopper_kernel, merge_parts_kernel)
        merged(kernels, q, k, indices, sunk, *scratch(q, memory), out, lse)
    return True


@lru_cache(maxsize=512)
def _plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    q_dtype: torch.dtype,
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    k_dtype: torch.dtype,
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    indices_shape: tuple[int, ...],
    indices_strides: tuple[int, ...],
    page_size: int,
    scale: float,
    sinks: bool,
    processors: int,
) -> _Plan | None:
    """Return the launches, or None for what the kernel does not take."""
    if not (
        q_shape[3] == LATENT
        and v_shape[3] == 2 * HALF
        and k_shape[2] == 1
        and page_size == 1
        and scale > 0
        and k_strides == v_strides
        and q_dtype == k_dtype
        and q_dtype in _HALF_PRECISION
        # the compiler knows as much of strides in multiples of 16
        and not any(extent % 16 for extent in (*q_strides[:3], *k_strides[:2]))
    ):
        return None
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
    if parts == 1:
        return _Plan(attend, None, ())
    rows = parts * tokens * heads
    merge = merge_plan(parts, (batch, q_len, heads, 2 * HALF), sinks)
    merged = Launches((attend, (0, 1, 2, 3, 4, 5)), (merge, (4, 5, 3, 6, 7)), given=4)
    memory = ((rows * 2 * HALF, torch.float32), (rows, torch.float32))
    return _Plan(attend, merged, memory)
