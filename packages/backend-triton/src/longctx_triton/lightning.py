"""Linear attention with a fixed decay a head, and its gradient, on NVIDIA GPUs.

Forward and backward are the same scan: with ``(q, k, v)`` replaced by ``(dout, v, k)`` it gives
``dq``; run backwards in time on ``(v, dout, q)`` and ``(k, q, dout)`` it gives ``dk`` and ``dv``
(arXiv 2401.04658, algorithm 2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longctx_triton.kernels.lightning_decode import lightning_decode_kernel
from longctx_triton.kernels.lightning_scan import lightning_scan_kernel, lightning_state_kernel
from longctx_triton.launch.device import Device, device_of
from longctx_triton.launch.lightning_segments import cut_sequence
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.tuning import tuned

__all__ = ["lightning_backward", "lightning_decode_forward", "lightning_forward"]

DECODE_BLOCK_V = 32
NARROW_PROGRAMS = 1.5
"""Programs of 32 value channels on each multiprocessor above which they are not made wider."""


class _Tiles(NamedTuple):
    block_t: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


def lightning_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `longctx.protocols.attention.LightningAttention.lightning_forward`.

    One pass over the tokens. Where batch and heads do not fill the GPU, sequences are cut into
    segments whose states are computed first, from keys and values alone. Packed lengths are read
    on the device.
    """
    final = _new_state(q, v, cu_seqlens)
    out = _scan(q, k, v, log_decay, initial_state, final, scale, cu_seqlens, reverse=False)
    return out, final


def lightning_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `longctx.protocols.attention.LightningAttention.lightning_backward`.

    Three scans, without atomics: the same bits every time.
    """
    dinitial = _new_state(q, v, cu_seqlens)
    first = None if initial_state is None else initial_state.transpose(2, 3)
    last = None if dfinal_state is None else dfinal_state.transpose(2, 3)
    shared = (scale, cu_seqlens)
    dq = _scan(dout, v, k, log_decay, first, None, *shared, reverse=False)
    dk = _scan(v, dout, q, log_decay, last, None, *shared, reverse=True)
    dv = _scan(k, q, dout, log_decay, dfinal_state, dinitial, *shared, reverse=True)
    return dq, dk, dv, dinitial


def lightning_decode_forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, *, scale: float
) -> Tensor:
    """See `longctx.protocols.attention.LightningAttention.lightning_decode_forward`."""
    batch, _, heads, head_dim = q.shape
    value_dim = v.shape[3]
    out = torch.empty(batch, 1, heads, value_dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    block_k = triton.next_power_of_2(head_dim)
    block_v = min(DECODE_BLOCK_V, triton.next_power_of_2(value_dim))
    launch(
        lightning_decode_kernel, (triton.cdiv(value_dim, block_v), heads, batch),
        q, k, v, state, log_decay, out, scale, heads,
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
        *state.stride(),
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_K=block_k, BLOCK_V=block_v,
        num_warps=4,
    )  # fmt: skip
    return out


def _new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
) -> Tensor:
    """Return ``out [B, T, H, V]`` of one scan; fill ``final`` if given.

    Only a state that is handed out is worth the second product that makes up for rounding decayed
    values: inside, the next product rounds it as coarsely.
    """
    batch, length, heads, head_dim = q.shape
    value_dim = v.shape[3]
    out = torch.empty(batch, length, heads, value_dim, dtype=q.dtype, device=q.device)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if sequences * heads * value_dim == 0:
        return out
    device = device_of(q.device)
    packed = cu_seqlens is not None
    tiles = _tiles(head_dim, value_dim, heads if packed else heads * batch, device)
    programs = sequences * heads * triton.cdiv(value_dim, tiles.block_v)
    segments, least_tokens = cut_sequence(
        sequences, packed, programs // sequences, length, device.processors
    )
    least_chunks = triton.cdiv(least_tokens, tiles.block_t)
    counts = (length, heads, segments, least_chunks)
    strides = (*k.stride()[:3], *v.stride()[:3])
    options = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": tiles.block_k,
        "BLOCK_V": tiles.block_v,
        "BLOCK_T": tiles.block_t,
        "REVERSE": reverse,
        "EXACT": final is not None,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    local = None
    if segments > 1:
        shape = (sequences, heads, segments, head_dim, value_dim)
        local = torch.empty(shape, dtype=torch.float32, device=q.device)
        lightning_state_kernel[(programs * segments,)](
            k, v, log_decay, cu_seqlens, local, scale, *counts, *strides, **options
        )
    lightning_scan_kernel[(programs * segments,)](
        q, k, v, log_decay, cu_seqlens, initial, local, out, final, scale, *counts,
        *q.stride()[:3], *strides,
        *((0, 0, 0, 0) if initial is None else initial.stride()), out.stride(0), **options,
    )  # fmt: skip
    return out


@tuned("lightning", apart=("runs",))
def _tiles(head_dim: int, value_dim: int, runs: int, device: Device) -> _Tiles:
    """Choose tiles for ``runs`` independent scans."""
    block_k, block_v = (max(16, triton.next_power_of_2(d)) for d in (head_dim, value_dim))
    if device.interpreted:  # the interpreter: several chunks and tiles for small shapes too
        return _Tiles(32, block_k, min(block_v, 64), 1, 1)
    if device.arch[0] != 9:
        stages = 3 if device.large_shared else 2
        return _Tiles(64, block_k, min(block_v, 32 if block_k <= 128 else 16), 4, stages)
    if block_k > 128:
        return _Tiles(64, block_k, min(block_v, 32), 4, 2)
    # chunks follow one another, so two programs a multiprocessor hide what one waits for
    narrow = runs * triton.cdiv(block_v, 32) >= NARROW_PROGRAMS * device.processors
    return _Tiles(64, block_k, min(block_v, 32 if narrow else 64), 4, 3)
