"""Linear attention with a fixed decay a head, and its gradient, on NVIDIA GPUs.

Forward and backward are the same scan: with ``(q, k, v)`` replaced by ``(dout, v, k)`` it gives
``dq``; run backwards in time on ``(v, dout, q)`` and ``(k, q, dout)`` it gives ``dk`` and ``dv``
(arXiv 2401.04658, algorithm 2).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longctx_triton.kernels.lightning_decode import lightning_decode_kernel
from longctx_triton.kernels.lightning_scan import lightning_scan_kernel, lightning_state_kernel
from longctx_triton.launch.device import Device, device_of
from longctx_triton.launch.lightning_segments import cut_sequence
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import used_strides
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
    q, k, v = (_even(t) for t in (q, k, v))
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
    dout, q, k, v = (_even(t) for t in (dout, q, k, v))
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
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    plan = _decode_plan(
        q.shape, q.stride(), k.stride(), v.shape, v.stride(), state.stride(), scale
    )
    plan(lightning_decode_kernel, q, k, v, state, log_decay, out)
    return out


EVEN = 16
"""Triton knows of a stride whether it is a multiple of this: then rows come in wide words."""


def _even(t: Tensor) -> Tensor:
    """Return a tensor whose strides are multiples of `EVEN`: itself, or else a copy.

    Of other strides the tiles would be read two bytes at a time, with hundreds of bytes of
    spills, and ptxas 12.8 makes wrong code of some of them (`halves_of_one_register` of the
    listing checks).
    """
    return t.contiguous() if _is_odd(t.shape, t.stride()) else t


@lru_cache(maxsize=512)
def _is_odd(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return any(stride % EVEN for stride in used_strides(shape, strides))


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
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    plan = _scan_plan(
        q.shape, q.stride(), k.stride(), v.shape, v.stride(),
        (0, 0, 0, 0) if initial is None else initial.stride(), sequences, final is not None,
        scale, reverse, device_of(q.device),
    )  # fmt: skip
    if plan is None:
        return out
    local = None
    if plan.state is not None:
        local = torch.empty(plan.local, dtype=torch.float32, device=q.device)
        plan.state(lightning_state_kernel, k, v, log_decay, cu_seqlens, local)
    plan.scan(lightning_scan_kernel, q, k, v, log_decay, cu_seqlens, initial, local, out, final)
    return out


class _ScanPlan(NamedTuple):
    """Launches of one scan: of segments' states, with the shape of their memory, and of the scan.

    ``state`` is None where sequences are not cut.
    """

    state: Prepared | None
    local: tuple[int, ...]
    scan: Prepared


@lru_cache(maxsize=512)
def _scan_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    initial_strides: tuple[int, ...],
    packed_sequences: int | None,
    exact: bool,
    scale: float,
    reverse: bool,
    device: Device,
) -> _ScanPlan | None:
    """Return what one scan launches, None where there is nothing to scan."""
    batch, length, heads, head_dim = q_shape
    value_dim = v_shape[3]
    packed = packed_sequences is not None
    sequences = batch if packed_sequences is None else packed_sequences
    if sequences * heads * value_dim == 0:
        return None
    tiles = _tiles(head_dim, value_dim, heads if packed else heads * batch, device)
    programs = sequences * heads * triton.cdiv(value_dim, tiles.block_v)
    segments, least_tokens = cut_sequence(
        sequences, packed, programs // sequences, length, device.processors
    )
    counts = (length, heads, segments, triton.cdiv(least_tokens, tiles.block_t))
    k_shape = (*v_shape[:3], head_dim)
    strides = (*used_strides(k_shape, k_strides), *used_strides(v_shape, v_strides))
    options = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": tiles.block_k,
        "BLOCK_V": tiles.block_v,
        "BLOCK_T": tiles.block_t,
        "REVERSE": reverse,
        "EXACT": exact,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    grid = (programs * segments,)
    out_stride = length * heads * value_dim
    state = Prepared(grid, (scale, *counts, *strides), options) if segments > 1 else None
    scan = Prepared(
        grid,
        (
            scale,
            *counts,
            *used_strides(q_shape, q_strides),
            *strides,
            *initial_strides,
            out_stride,
        ),
        options,
    )
    return _ScanPlan(state, (sequences, heads, segments, head_dim, value_dim), scan)


@lru_cache(maxsize=512)
def _decode_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    state_strides: tuple[int, ...],
    scale: float,
) -> Prepared:
    batch, _, heads, head_dim = q_shape
    value_dim = v_shape[3]
    block_v = min(DECODE_BLOCK_V, triton.next_power_of_2(value_dim))
    # the strides of batch and heads: there is one token
    strides = (s for t in (q_strides, k_strides, v_strides) for s in (t[0], t[2]))
    return Prepared(
        (triton.cdiv(value_dim, block_v), heads, batch),
        (scale, heads, *strides, *state_strides),
        {
            "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
            "BLOCK_K": triton.next_power_of_2(head_dim), "BLOCK_V": block_v, "num_warps": 4,
        },
    )  # fmt: skip


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
