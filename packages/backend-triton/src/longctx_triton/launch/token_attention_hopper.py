"""When and how the Gluon kernel of attention inside token sets runs on Hopper."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_triton.kernels.clear_rows import clear_rows_kernel
from longctx_triton.kernels.flash_hopper import ROWS
from longctx_triton.kernels.token_attention_hopper import token_attention_hopper_kernel
from longctx_triton.launch.clear_rows import COUNTER, clearing
from longctx_triton.launch.device import Device
from longctx_triton.launch.prepared import Launches, Prepared
from longctx_triton.launch.scratch import scratch
from longctx_triton.launch.tuning import tuned

__all__ = ["GatherTiles", "gather_tiles", "token_attention_forward"]

_HEAD_SIZES = (64, 128)
_HALF = (torch.bfloat16, torch.float16)
_LOG2_E = 1.4426950408889634


class GatherTiles(NamedTuple):
    """Sizes of the kernel's tiles.

    Attributes
    ----------
    stages : int
        Steps of keys and of values in flight.
    registers, gather_registers : int
        Registers of a thread that multiplies, and of one that copies.
    """

    stages: int
    registers: int
    gather_registers: int


@tuned("token_walk")
def gather_tiles(head_dim: int) -> GatherTiles:
    """Return the tiles for a head size of 64 or 128."""
    if head_dim == 64:
        return GatherTiles(4, 232, 40)
    # those that multiply need what they get; those that copy have the time to spill
    return GatherTiles(3, 240, 24)


def token_attention_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    scale: float,
) -> bool:
    """Write ``out`` and ``lse``: the rows whose tokens are chosen, and 0 and -inf elsewhere.

    Parameters
    ----------
    device : Device
    q, k, v : Tensor, (batch, seq, heads, head_dim)
    out, lse : Tensor
        Contiguous, ``(batch, q_len, q_heads, head_dim)`` and ``(batch, q_heads, q_len)`` fp32.
    indices : Tensor, (batch, sets, capacity), int32
    counts : Tensor, (batch, sets), int32
    scale : float

    Returns
    -------
    bool
        Whether it ran: for the types and head sizes of the kernel, and addresses and strides in
        multiples of 16 bytes, which a copy moves.
    """
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return False
    plan = _plan(
        q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), indices.shape,
        indices.stride(), counts.stride(), scale, device,
    )  # fmt: skip
    if plan is None:
        return False
    kernels = (clear_rows_kernel, token_attention_hopper_kernel)
    plan(kernels, q, k, v, indices, counts, out, lse, *scratch(q, COUNTER))
    return True


@lru_cache(maxsize=512)
def _plan(
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    indices_shape: tuple[int, ...],
    index_strides: tuple[int, ...],
    count_strides: tuple[int, ...],
    scale: float,
    device: Device,
) -> Launches | None:
    """Return the launches that clear and attend, or None for what the kernel does not take.

    They take q, k, v, the sets, the results and the counter.
    """
    batch, q_len, heads, head_dim = q_shape
    k_len, kv_heads = k_shape[1:3]
    strides = (*q_strides[:3], *k_strides[:3], *v_strides[:3])
    if (
        dtype not in _HALF
        or head_dim not in _HEAD_SIZES
        or v_shape[3] != head_dim
        or k_len == 0
        or scale <= 0
        or any(stride % 16 for stride in strides)
    ):
        return None
    _, sets, capacity = indices_shape
    tiles, units, group = -(-capacity // (2 * ROWS)), batch * heads, heads // kv_heads
    sizes = gather_tiles(head_dim)
    attend = Prepared(
        (min(tiles * units, device.processors),),
        (
            *strides, *index_strides[:2], count_strides[0], tiles, units, heads, group,
            heads // sets, capacity, q_len, k_len, scale * _LOG2_E,
        ),
        {
            "HEAD_DIM": head_dim, "STAGES": sizes.stages,
            "REGISTERS": sizes.registers, "GATHER_REGISTERS": sizes.gather_registers,
            "num_warps": 4,
        },
    )  # fmt: skip
    return Launches(
        (clearing((*q_shape[:3], head_dim)), (5, 6, 7)),
        (attend, (0, 1, 2, 5, 6, 3, 4, 7)),
        given=5,
    )
