"""Exact softmax attention in plain PyTorch: fused kernels where they fit, else matrix products.

Fused kernels run dense pieces: windows are cut into blocks of queries, causal attention with
earlier keys into a prefix and a square, and the pieces are merged exactly by their log-sum-exp.
No piece is ever ``q_len`` by ``k_len`` in memory.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from longctx.torch_backend._cuda_flash import (
    cudnn_chosen,
    cudnn_kernel,
    flash_kernel,
    flash_kernel_runs,
)
from longctx.torch_backend._flash_tiles import BUDGET, Band, tiled_forward
from longctx.torch_backend._flash_tiles_backward import sink_gradient, tiled_backward
from longctx.torch_backend._fp8 import widen
from longctx.torch_backend._merge import add_sinks_, merge_pair
from longctx.torch_backend._sdpa import attend, fused

__all__ = ["flash_backward", "flash_forward"]

Pair = tuple[Tensor, Tensor]

_LEAST_ROWS, _MOST_ROWS = 64, 512  # queries of a window's block
_MASK_BYTES = 16  # a pair's distance, flag and bias while a mask is made


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
) -> Pair:
    """See `longctx.protocols.attention.FlashAttention.flash_forward`.

    fp8 inputs are widened whole: to fp32 on a CPU, to bf16 (exact for keys and values) on a GPU.
    Packed lengths are read on the host, except for half precision without softcap on CUDA.
    """
    right = 0 if causal else window_right
    fp8 = q.dtype == torch.float8_e4m3fn
    if fp8:
        q, k, v = _widened(q, k, v, q_descale, k_descale)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, lse = _forward(q, k, v, window_left, right, softcap, scale)
    elif q.shape[1] == 0 or k.shape[1] == 0:  # PyTorch's packed kernel cannot be launched
        out, lse = _empty(q, v)
    elif flash_kernel_runs(q, v) and not softcap:
        out, lse = flash_kernel(
            q, k, v, left=window_left, right=right, scale=scale,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        )  # fmt: skip
    else:
        out, lse = _empty(q, v)
        for rows, keys, count in _runs(cu_seqlens_q, cu_seqlens_k):
            part, part_lse = _forward(
                _batched(q, rows, count), _batched(k, keys, count), _batched(v, keys, count),
                window_left, right, softcap, scale,
            )  # fmt: skip
            _batched(out, rows, count).copy_(part)
            torch.unflatten(lse[0, :, rows], 1, (count, -1)).copy_(part_lse.transpose(0, 1))
    if sinks is not None:
        lse = add_sinks_(out, lse, sinks)
    if fp8:
        if v_descale is not None:
            out = out * _per_query_head(v_descale, out.shape[2])
        out = out.to(torch.bfloat16)
    return out, lse


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

    Packed lengths are read on the host.
    """
    right = 0 if causal else window_right
    delta = (dout.to(lse.dtype) * out).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    dsinks = None if sinks is None else sink_gradient(sinks, lse, delta)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        band = Band(window_left, right, k.shape[1] - q.shape[1], k.shape[1])
        grads = tiled_backward(dout, delta, q, k, v, lse, band=band, softcap=softcap, scale=scale)
        return *grads, dsinks
    # packed keys beyond every query's sight, and empty sequences, keep a gradient of 0
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    for rows, keys, count in _runs(cu_seqlens_q, cu_seqlens_k):
        q_part, dout_part = (_batched(t, rows, count) for t in (q, dout))
        k_part, v_part = (_batched(t, keys, count) for t in (k, v))
        delta_part, lse_part = (
            torch.unflatten(t[0, :, rows], 1, (count, -1)).transpose(0, 1) for t in (delta, lse)
        )
        band = Band(window_left, right, k_part.shape[1] - q_part.shape[1], k_part.shape[1])
        parts = tiled_backward(
            dout_part, delta_part, q_part, k_part, v_part, lse_part,
            band=band, softcap=softcap, scale=scale,
        )  # fmt: skip
        for whole, where, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
            _batched(whole, where, count).copy_(part)
    return dq, dk, dv, dsinks


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int | None,
    right: int | None,
    softcap: float,
    scale: float,
) -> Pair:
    """Attend within one batch of equally long sequences, by the cheapest way that is exact."""
    q_len, k_len = q.shape[1], k.shape[1]
    shift = k_len - q_len
    # leading queries that stand before every key
    empty = q_len if k_len == 0 else 0 if right is None else min(max(-shift - right, 0), q_len)
    if empty:
        out, lse = _empty(q, v)
        if empty < q_len:
            part, part_lse = _forward(q[:, empty:], k, v, left, right, softcap, scale)
            out[:, empty:] = part
            lse[:, :, empty:] = part_lse
        return out, lse
    if q.numel() == 0:
        return _empty(q, v)
    right = None if right is not None and shift + right >= k_len - 1 else right
    left = None if left is not None and left >= k_len - 1 else left
    # queries before the first key: the kernel takes a right side of k_len or more for an open one
    open_right = right is None or right >= k_len
    tricky = shift < 0 and open_right and not (left is None and right is None)
    if flash_kernel_runs(q, v) and not softcap and not tricky:
        square = right == 0 and shift == 0
        if left is None and (right is None or square) and cudnn_chosen(q, k, v, causal=square):
            return cudnn_kernel(q, k, v, causal=square, scale=scale)
        return flash_kernel(q, k, v, left=left, right=right, scale=scale)
    if softcap or not fused(q, masked=left is not None):
        band = Band(left, right, shift, k_len)
        return tiled_forward(q, k, v, band=band, softcap=softcap, scale=scale)
    if left is None and right is None:
        return attend(q, k, v, causal=False, scale=scale)
    if left is None and right == 0:
        return _causal(q, k, v, scale)
    if left is None and right is not None:
        # all but the last ``right`` queries are causal towards a later end, those see every key
        late = q_len - right
        parts = (
            _causal(q[:, :late], k, v, scale),
            attend(q[:, late:], k, v, causal=False, scale=scale),
        )
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    return _windowed(q, k, v, Band(left, right, shift, k_len), scale)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Pair:
    """Bottom-right causality: a square of the last keys, and earlier keys that everyone sees."""
    shift = k.shape[1] - q.shape[1]
    square = attend(q, k[:, shift:], v[:, shift:], causal=True, scale=scale)
    if shift == 0:
        return square
    return merge_pair(attend(q, k[:, :shift], v[:, :shift], causal=False, scale=scale), square)


def _windowed(q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float) -> Pair:
    """Attend in blocks of queries over the keys that they may see, with one small mask each."""
    q_len = q.shape[1]
    width = band.k_len
    if band.left is not None and band.right is not None:
        width = min(width, band.left + band.right + 1)
    rows = min(q_len, max(_LEAST_ROWS, min(_MOST_ROWS, width // 2)))
    rows = min(rows, max(1, BUDGET // (_MASK_BYTES * (width + rows))))
    out, lse = _empty(q, v)
    mask, made_for = None, None
    for first in range(0, q_len, rows):
        end = min(first + rows, q_len)
        begin_k, end_k = band.keys(first, end - 1)
        shape = (end - first, end_k - begin_k, begin_k - first)
        if shape != made_for:  # blocks that touch no edge share one mask
            mask, made_for = _mask(q, band, range(first, end), range(begin_k, end_k)), shape
        block = attend(
            q[:, first:end], k[:, begin_k:end_k], v[:, begin_k:end_k],
            causal=False, scale=scale, mask=mask,
        )  # fmt: skip
        out[:, first:end], lse[:, :, first:end] = block
    return out, lse


def _mask(q: Tensor, band: Band, rows: range, keys: range) -> Tensor:
    outside = band.outside(
        torch.arange(rows.start, rows.stop, device=q.device),
        torch.arange(keys.start, keys.stop, device=q.device),
    )
    return torch.zeros(outside.shape, dtype=q.dtype, device=q.device).masked_fill_(
        outside, -torch.inf
    )


def _empty(q: Tensor, v: Tensor) -> Pair:
    """Return the result of queries that see nothing."""
    batch, q_len, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(batch, q_len, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return out, torch.full((batch, heads, q_len), -torch.inf, dtype=lse_dtype, device=q.device)


def _runs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice, int]]:
    """Return neighbours of equal lengths as ``(rows, keys, count)``: one batch each."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    spans = zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    runs = []
    for (q_len, _), group in groupby(spans, lambda s: (s[1] - s[0], s[3] - s[2])):
        members = list(group)
        if q_len:
            rows = slice(members[0][0], members[-1][1])
            runs.append((rows, slice(members[0][2], members[-1][3]), len(members)))
    return runs


def _batched(t: Tensor, where: slice, count: int) -> Tensor:
    """View a run of packed sequences ``[1, total, H, D]`` as ``[count, len, H, D]``."""
    part = t[0, where]
    return torch.unflatten(part, 0, (count, part.shape[0] // count))


def _per_query_head(descale: Tensor, heads: int) -> Tensor:
    """Return factors ``[B, Hkv]`` as ``[B, 1, Hq, 1]``."""
    spread = descale.repeat_interleave(heads // descale.shape[1], 1)
    return spread.unsqueeze(1).unsqueeze(3)


def _widened(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Widen fp8 inputs; the factors of the scores go into the queries, the smallest tensor."""
    dtype = torch.float32 if q.device.type == "cpu" else torch.bfloat16
    wide = widen(q, torch.float32)
    for descale in (q_descale, k_descale):
        if descale is not None:
            wide = wide * _per_query_head(descale, q.shape[2])
    return wide.to(dtype), widen(k, dtype), widen(v, dtype)
