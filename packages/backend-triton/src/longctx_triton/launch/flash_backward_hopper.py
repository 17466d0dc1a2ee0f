"""When and how the Gluon backward kernel runs on Hopper."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_triton.kernels.flash_backward_hopper import (
    KEYS,
    ROWS,
    flash_backward_hopper_kernel,
)
from longctx_triton.kernels.flash_dq_sums import flash_dq_sums_kernel
from longctx_triton.launch.flash_hopper import copyable, rows_block
from longctx_triton.launch.prepared import Prepared, launch

__all__ = [
    "BackwardTiles",
    "backward_tiles",
    "hopper_backward",
    "hopper_backward_takes",
    "padded_rows",
]


class BackwardTiles(NamedTuple):
    """How the kernel shares its work.

    Attributes
    ----------
    stages : int
        Blocks of queries and dout in flight.
    ds_stages : int
        Blocks of the scores' gradient in shared memory.
    alone : bool
        Whether a third warpgroup sums dq; else the two that sum dk and dv do, half each.
    width : int
        Channels of dq that the third one multiplies at a time.
    registers, dq_registers : int
        Registers of a thread of the first two warpgroups and of the third.
    """

    stages: int
    ds_stages: int
    alone: bool
    width: int
    registers: int
    dq_registers: int = 0


def backward_tiles(head_dim: int) -> BackwardTiles:
    """Return the tiles for a head size of 64 or 128."""
    if head_dim == 64:
        return BackwardTiles(2, 2, True, 64, 208, 72)
    return BackwardTiles(2, 2, False, 64, 240)


def hopper_backward_takes(
    q: Tensor, k: Tensor, v: Tensor, right: int | None, scale: float
) -> bool:
    """Return whether the kernel can run; without left window, softcap or packed sequences.

    ``right`` is 0 for causal attention and None for full. The copy engine wants addresses and
    strides in multiples of 16 bytes.
    """
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] == v.shape[3]
        and q.shape[3] in (64, 128)
        and right in (None, 0)
        and q.numel() > 0
        and k.numel() > 0
        and scale > 0
        and all(copyable(t) for t in (q, k, v))
    )


def padded_rows(q_len: int) -> int:
    """Return the number of queries in whole blocks."""
    return -(-q_len // ROWS) * ROWS


def hopper_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse2: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    causal: bool,
    scale: float,
    section: int,
) -> None:
    """Write ``dq``, ``dk`` and ``dv``.

    Sums of dq are added to memory as they come, so their last bits differ from run to run.

    Parameters
    ----------
    dout : Tensor, (batch, q_len, q_heads, head_dim)
    q, k, v : Tensor, (batch, seq, heads, head_dim)
        As `hopper_backward_takes` accepts them.
    lse2, delta : Tensor, (batch, q_heads, padded_rows(q_len)), float32
        Of `flash_delta_kernel`; +inf and 0 in rows past the end.
    dq, dk, dv : Tensor
        Contiguous.
    causal : bool
    scale : float
    section : int
        KV heads, over all batch entries, whose queries fit the L2 cache together.
    """
    if not copyable(dout):
        dout = dout.contiguous()
    batch, q_len, q_heads, head_dim = q.shape
    padded = padded_rows(q_len)
    plan = _plan(
        q.shape, q.stride(), dout.stride(), k.shape, k.stride(), v.stride(),
        causal, scale, section, backward_tiles(head_dim),
    )  # fmt: skip
    sums = torch.zeros((batch, q_heads, padded, head_dim), dtype=torch.float32, device=q.device)
    plan(flash_backward_hopper_kernel, q, dout, k, v, dk, dv, lse2, delta, sums)
    blocks = padded // ROWS
    launch(
        flash_dq_sums_kernel, (batch * q_heads * blocks,),
        sums, dq, scale, blocks, q_heads, q_len,
        HEAD_DIM=head_dim, ROWS=ROWS, num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=512)
def _plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    dout_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    causal: bool,
    scale: float,
    section: int,
    tiles: BackwardTiles,
) -> Prepared:
    batch, k_len, kv_heads, head_dim = k_shape
    count, units = -(-k_len // (2 * KEYS)), batch * kv_heads
    out_strides = (k_len * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1)
    return Prepared(
        (count * units,),
        (
            scale, count, units, section, kv_heads, q_shape[2] // kv_heads,
            q_shape[1], k_len, padded_rows(q_shape[1]),
        ),
        {
            "HEAD_DIM": head_dim, "STAGES": tiles.stages, "DS_STAGES": tiles.ds_stages,
            "WIDTH": tiles.width, "CAUSAL": causal, "ALONE": tiles.alone,
            "REGISTERS": tiles.registers, "DQ_REGISTERS": tiles.dq_registers, "num_warps": 4,
        },
        (
            rows_block(q_shape, q_strides, ROWS, 2),
            rows_block(q_shape, dout_strides, ROWS, 2),
            rows_block(k_shape, k_strides, KEYS, 2),
            rows_block(k_shape, v_strides, KEYS, 2),
            rows_block(k_shape, out_strides, KEYS, 2),
            rows_block(k_shape, out_strides, KEYS, 2),
        ),
    )  # fmt: skip
