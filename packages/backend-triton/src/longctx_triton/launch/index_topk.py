"""Exact top-k of the indexer's scores, some rows at a time within a fixed budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longctx.settings import budget_bytes
from longctx_triton.kernels.select_rows import choose_rows
from longctx_triton.kernels.topk_segments import topk_segment_kernel
from longctx_triton.launch import dsa_tiles
from longctx_triton.launch.index_scores import bounds_or, score_rows
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.sizes import padded

__all__ = ["index_topk_forward"]

MOST_BATCHES = 65535
"""Batch entries of one launch: the extent of a grid's third axis."""


def index_topk_forward(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    top_k: int,
    *,
    causal: bool,
    key_start: Tensor | None,
    key_end: Tensor | None,
    deterministic: bool,
) -> Tensor:
    """Return int32 ``[B, Sq, top_k]``: the best keys ascending, then -1; ties to the lower key.

    Always exact and deterministic. Scores are written for as many query rows at a time as
    ``LONGCTX_INDEX_BUDGET_MIB`` has room for (one row in any case), and only where they are seen.
    """
    batch, q_len = q.shape[:2]
    k_len = k.shape[1]
    result = torch.empty(batch, q_len, top_k, dtype=torch.int32, device=q.device)
    if result.numel() == 0:
        return result
    if k_len == 0:
        return result.fill_(-1)
    in_segments = 2 * _slots(top_k) <= dsa_tiles.SEGMENT
    row_bytes = 4 * _stride(k_len) + (
        _level_bytes(k_len, top_k) if in_segments else k_len // 64 + 64
    )
    rows = max(1, budget_bytes("LONGCTX_INDEX_BUDGET_MIB") // row_bytes)
    rows, batches = min(rows, q_len), max(1, min(rows // q_len, batch, MOST_BATCHES))
    scores = torch.empty(batches * rows * _stride(k_len), dtype=torch.float32, device=q.device)
    shift = k_len - q_len
    for b0 in range(0, batch, batches):
        b1 = min(b0 + batches, batch)
        for t0 in range(0, q_len, rows):
            t1 = min(t0 + rows, q_len)
            width = min(k_len, t1 + shift) if causal else k_len
            if width <= 0:
                result[b0:b1, t0:t1] = -1
                continue
            score_rows(
                q, k, weights, k_scale, key_start, key_end, scores, causal=causal,
                batches=(b0, b1), rows=(t0, t1), width=width, stride=_stride(width),
                fill=not in_segments,
            )  # fmt: skip
            if in_segments:
                _choose_in_segments(
                    scores, result, key_start, key_end, causal=causal, batches=(b0, b1),
                    rows=(t0, t1), shift=shift, width=width, k_len=k_len,
                )  # fmt: skip
            else:
                shape = (b1 - b0, t1 - t0, _stride(width))
                seen = scores[: math.prod(shape)].view(shape)[..., :width]
                choose_rows(seen, None, top_k, result[b0:b1, t0:t1], None, 0)
    return result


def _stride(width: int) -> int:
    """Return the distance of two rows of scores: wide loads need multiples of 16 bytes."""
    return -(-width // 16) * 16


def _slots(top_k: int) -> int:
    """Return how many candidates a segment may keep; a search for exactly top_k takes longer."""
    return 2 * padded(top_k)


def _level_bytes(k_len: int, top_k: int) -> int:
    """Return the bytes of a row's candidates: keys and positions, two levels at a time."""
    segments = -(-k_len // dsa_tiles.SEGMENT)
    return 0 if segments == 1 else 2 * segments * (8 * _slots(top_k) + 4)


def _choose_in_segments(
    scores: Tensor,
    result: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    *,
    causal: bool,
    batches: tuple[int, int],
    rows: tuple[int, int],
    shift: int,
    width: int,
    k_len: int,
) -> None:
    """Reduce rows of scores level by level to one segment, whose best are the result."""
    q_len, top_k = result.shape[1:]
    rows_a_batch = rows[1] - rows[0]
    n_rows = (batches[1] - batches[0]) * rows_a_batch
    slots = _slots(top_k)
    ranged, start, end = bounds_or(result, key_start, key_end)
    entries, segments_in = width, 0
    source, positions, counts = scores, result, result
    last = False
    # two programs a multiprocessor hide each other's barriers; the interpreter has no such option
    registers = {"maxnreg": 64} if scores.is_cuda else {}
    while not last:
        segment = min(dsa_tiles.SEGMENT, padded(entries))
        segments = -(-entries // segment)
        last = segments == 1
        if last:
            keys_out, positions_out, counts_out = result, result, result
        else:
            shape = (n_rows, segments, slots)
            keys_out = torch.empty(shape, dtype=torch.int32, device=scores.device)
            positions_out = torch.empty(shape, dtype=torch.int32, device=scores.device)
            counts_out = torch.empty(shape[:2], dtype=torch.int32, device=scores.device)
        launch(
            topk_segment_kernel, (n_rows, segments),
            source, positions, counts, start, end, keys_out, positions_out, counts_out,
            start.stride(0), end.stride(0), batches[0], rows[0], rows_a_batch, q_len, shift,
            k_len, _stride(width), segments_in, top_k,
            SEGMENT=segment, SLOTS=slots, LEVEL0=segments_in == 0, LAST=last,
            CAUSAL=causal, RANGE=ranged,
            num_warps=max(4, min(16, segment // 1024)), **registers,
        )  # fmt: skip
        source, positions, counts = keys_out, positions_out, counts_out
        segments_in, entries = segments, segments * slots
