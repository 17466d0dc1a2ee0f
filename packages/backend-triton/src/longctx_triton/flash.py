"""Exact softmax attention and its gradient on NVIDIA GPUs.

On Hopper, ``flash_forward`` runs a warp-specialised Gluon kernel where that fits; everywhere else,
and with ``LONGCTX_TRITON_FLASH=portable`` in the environment, kernels of ``tl.dot``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from longctx_triton.kernels.flash_backward import (
    flash_delta_kernel,
    flash_dkdv_kernel,
    flash_dq_kernel,
)
from longctx_triton.kernels.flash_forward import flash_forward_kernel
from longctx_triton.launch.device import Device, device_of
from longctx_triton.launch.flash import dkdv_tiles, dq_tiles, forward_tiles
from longctx_triton.launch.flash_backward_hopper import (
    hopper_backward,
    hopper_backward_takes,
    padded_rows,
)
from longctx_triton.launch.flash_hopper import hopper_forward
from longctx_triton.launch.key_walk_hopper import key_range_forward
from longctx_triton.launch.outputs import attention_outputs
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import heads_in_cache, padded, used_strides

__all__ = ["flash_backward", "flash_forward"]

_FP8 = torch.float8_e4m3fn
_DELTA_ROWS = 64


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    sinks: Tensor | None,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `longctx.protocols.attention.FlashAttention.flash_forward`.

    fp8 scores are fp8 products where the tensor cores have them (sm_89 and later); weights and
    values meet in fp16, which holds every e4m3 value. Factors of fp8 tensors are at least 0.

    Environment
    -----------
    LONGCTX_TRITON_FLASH : {"portable"}, optional
        Run the ``tl.dot`` kernel on Hopper too, for comparison.
    """
    fp8 = q.dtype == _FP8
    out, lse = attention_outputs(q, v, torch.bfloat16 if fp8 else None)
    if lse.numel() == 0:
        return out, lse
    left, right = _band(causal, window_left, window_right, q.shape[1], k.shape[1])
    device = device_of(q.device)
    if softcap == 0 and cu_seqlens_q is None and device.runs_gluon:
        if left is None:
            ran = hopper_forward(
                device, q, k, v, out, lse, right, sinks, (q_descale, k_descale, v_descale), scale
            )
        else:
            ran = right == 0 and key_range_forward(
                device, q, k, v, out, lse, scale=scale, window=left, sinks=sinks
            )
        if ran:
            return out, lse
    sequences = 0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    plan, bits = _forward_plan(
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, device,
        left, right, softcap, scale, sequences,
    )  # fmt: skip
    if bits:
        q, k, v = (t.view(torch.uint8) for t in (q, k, v))
    if fp8:
        q_descale, k_descale, v_descale = (
            None if t is None else t.contiguous() for t in (q_descale, k_descale, v_descale)
        )
    plan(
        flash_forward_kernel, q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_k,
        q_descale, k_descale, v_descale,
    )  # fmt: skip
    return out, lse


@lru_cache(maxsize=512)
def _forward_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    device: Device,
    left: int | None,
    right: int | None,
    softcap: float,
    scale: float,
    sequences: int,
) -> tuple[Prepared, bool]:
    """Return the launch of ``flash_forward_kernel``, and whether it reads fp8 as bytes."""
    batch, q_len, q_heads, head_dim = q_shape
    k_len, kv_heads, value_dim = v_shape[1:]
    fp8 = dtype == _FP8
    group = q_heads // kv_heads
    plain = left is None and softcap == 0 and not fp8
    row_bytes = (head_dim + value_dim) * dtype.itemsize
    section = min(batch * q_heads, group * heads_in_cache(device.l2, k_len, row_bytes))
    block_d, block_v = padded(head_dim), padded(value_dim)
    tiles = forward_tiles(device, max(block_d, block_v), plain)
    mode = ""
    if fp8:
        mode = "native" if device.arch >= (8, 9) else "bytes"
    # of packed sequences a bound that needs no lengths
    whole = -(-q_len // tiles.block_q)
    count = q_len // tiles.block_q + sequences + 1 if sequences else whole
    units = batch * q_heads
    plan = Prepared(
        (count * units,),
        (
            scale, softcap, left or 0, right or 0, q_len, k_len, sequences,
            units, q_heads, group, count, section,
            *used_strides(q_shape, q_strides), *used_strides(k_shape, k_strides),
            *used_strides(v_shape, v_strides),
        ),
        {
            "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_d, "BLOCK_V": block_v,
            "BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k,
            # the running maximum may be scaled afterwards only by a factor above 0
            "SOFTCAP": softcap > 0, "PRESCALED": softcap > 0 or fp8 or scale <= 0, "FP8": mode,
            "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None,
            "VARLEN": sequences > 0,
            "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
        },
    )  # fmt: skip
    return plan, mode == "bytes"


def flash_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    sinks: Tensor | None,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `longctx.protocols.attention.FlashAttention.flash_backward`.

    On Hopper dq is summed by atomics, in no fixed order, where the Gluon kernel fits. Elsewhere,
    and with ``torch.use_deterministic_algorithms``, dq, and dk with dv, each recompute the scores:
    without atomics, hence the same bits every time.

    Environment
    -----------
    LONGCTX_TRITON_FLASH : {"portable"}, optional
        Run the ``tl.dot`` kernels on Hopper too, for comparison.
    """
    batch, q_len, q_heads, head_dim = q.shape
    k_len, kv_heads, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group = q_heads // kv_heads
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    left, right = _band(causal, window_left, window_right, q_len, k_len)
    device = device_of(q.device)
    block_d, block_v = padded(head_dim), padded(value_dim)
    plain = left is None and softcap == 0
    one_pass = (
        plain
        and cu_seqlens_q is None
        and device.runs_gluon
        and not torch.are_deterministic_algorithms_enabled()
        and hopper_backward_takes(q, k, v, right, scale)
    )
    units = batch * q_heads
    row_tiles = -(-q_len // _DELTA_ROWS)
    rows = padded_rows(q_len) if one_pass else q_len
    delta, lse2 = torch.empty(2, batch, q_heads, rows, dtype=torch.float32, device=q.device)
    parts = None
    if sinks is not None:
        parts = torch.empty(row_tiles * batch, q_heads, dtype=torch.float32, device=q.device)
    flash_delta_kernel[(row_tiles * units,)](
        dout, out, lse, dlse, sinks, delta, lse2, parts, q_len, rows, units, q_heads,
        *_strides(dout), *_strides(out),
        VALUE_DIM=value_dim, BLOCK_V=block_v, BLOCK_Q=_DELTA_ROWS, num_warps=4,
    )  # fmt: skip
    dsinks = None if parts is None else parts.sum(0)
    if one_pass:
        hopper_backward(
            dout, q, k, v, lse2, delta, dq, dk, dv, causal=right == 0, scale=scale,
            section=min(batch * kv_heads, _fitting(device, q, dout, 2 * group)),
        )  # fmt: skip
        return dq, dk, dv, dsinks
    kind = (device, max(block_d, block_v), plain)
    by_query, by_key = dq_tiles(*kind), dkdv_tiles(*kind)
    sequences = 0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    strides = (*_strides(dout), *_strides(q), *_strides(k), *_strides(v))
    options = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "SOFTCAP": softcap > 0,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
        "VARLEN": cu_seqlens_q is not None,
    }
    count = _tile_count(k_len, cu_seqlens_k, by_key.block_k)
    flash_dkdv_kernel[(count * batch * kv_heads,)](
        dout, q, k, v, lse2, delta, dk, dv, cu_seqlens_q, cu_seqlens_k,
        scale, softcap, left or 0, right or 0,
        q_len, k_len, sequences, batch * kv_heads, kv_heads, group, count,
        min(batch * kv_heads, _fitting(device, q, dout, group)), *strides,
        BLOCK_Q=by_key.block_q, BLOCK_K=by_key.block_k, **options,
        num_warps=by_key.num_warps, num_stages=by_key.num_stages,
    )  # fmt: skip
    count = _tile_count(q_len, cu_seqlens_q, by_query.block_q)
    flash_dq_kernel[(count * units,)](
        dout, q, k, v, lse2, delta, dq, cu_seqlens_q, cu_seqlens_k,
        scale, softcap, left or 0, right or 0,
        q_len, k_len, sequences, units, q_heads, group, count,
        min(units, group * _fitting(device, k, v)), *strides,
        BLOCK_Q=by_query.block_q, BLOCK_K=by_query.block_k, **options,
        num_warps=by_query.num_warps, num_stages=by_query.num_stages,
    )  # fmt: skip
    return dq, dk, dv, dsinks


def _band(
    causal: bool, left: int | None, right: int | None, q_len: int, k_len: int
) -> tuple[int | None, int | None]:
    """Return the window with causality as its right side and sides that hide nothing as None."""
    right = 0 if causal else right
    return (
        None if left is None or left >= k_len - 1 else left,
        None if right is None or right >= q_len - 1 else right,
    )


def _tile_count(length: int, ends: Tensor | None, block: int) -> int:
    """Return the number of tiles, or for packed sequences a bound that needs no lengths."""
    if ends is None:
        return -(-length // block)
    return length // block + ends.shape[0]


def _fitting(device: Device, first: Tensor, second: Tensor, heads: int = 1) -> int:
    """Return how many times ``heads`` heads of two tensors fit the L2 cache."""
    row_bytes = (first.shape[3] + second.shape[3]) * first.element_size()
    return heads_in_cache(device.l2, first.shape[1], row_bytes, heads)


def _strides(t: Tensor) -> tuple[int, ...]:
    return used_strides(t.shape, t.stride())
