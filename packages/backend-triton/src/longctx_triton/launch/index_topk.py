"""Exact top-k of the indexer's scores, some rows at a time within a fixed budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longctx.settings import budget_bytes
from longctx_triton.kernels.select_rows import choose_rows
from longctx_triton.kernels.topk_rows import topk_rows_kernel
from longctx_triton.launch.device import device_of
from longctx_triton.launch.index_scores import bounds_or, score_rows
from longctx_triton.launch.prepared import launch
from longctx_triton.launch.topk_tiles import TopkTiles, part_count, topk_tiles

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
    tiles = topk_tiles(top_k)
    programs, rows = _within_budget(tiles, k_len, device_of(q.device).processors)
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
                fill=tiles is None,
            )  # fmt: skip
            if tiles is not None:
                _choose(
                    tiles, programs, scores, result, key_start, key_end,
                    batches=(b0, b1), rows=(t0, t1), shift=shift if causal else k_len,
                    width=width, k_len=k_len,
                )  # fmt: skip
            else:
                shape = (b1 - b0, t1 - t0, _stride(width))
                seen = scores[: math.prod(shape)].view(shape)[..., :width]
                choose_rows(seen, None, top_k, result[b0:b1, t0:t1], None, 0)
    return result


def _stride(width: int) -> int:
    """Return the distance of two rows of scores: wide loads need multiples of 16 bytes."""
    return -(-width // 16) * 16


def _within_budget(tiles: TopkTiles | None, k_len: int, multiprocessors: int) -> tuple[int, int]:
    """Return how many programs choose at a time, and how many rows of scores fit beside them."""
    budget = budget_bytes("LONGCTX_INDEX_BUDGET_MIB")
    row_bytes = 4 * _stride(k_len)
    if tiles is None:
        return 0, max(1, budget // (row_bytes + k_len // 64 + 64))
    fitting = budget // 8 // tiles.kept_bytes
    programs = max(1, min(tiles.resident * multiprocessors, fitting))
    rows = max(1, (budget - programs * tiles.kept_bytes) // row_bytes)
    # every program takes as many rows as the others
    return programs, rows - rows % programs if rows > programs else rows


def _choose(
    tiles: TopkTiles,
    programs: int,
    scores: Tensor,
    result: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    *,
    batches: tuple[int, int],
    rows: tuple[int, int],
    shift: int,
    width: int,
    k_len: int,
) -> None:
    """Choose of rows of scores, few rows in parts; query ``t`` sees keys before t + shift + 1."""
    q_len, top_k = result.shape[1:]
    rows_a_batch = rows[1] - rows[0]
    n_rows = (batches[1] - batches[0]) * rows_a_batch
    # two programs a multiprocessor keep it busy, and more of them are more to merge
    parts = part_count(
        n_rows, width, tiles.part_block, min(programs, 2 * device_of(scores.device).processors)
    )
    programs = min(programs, n_rows)
    size = programs * parts * tiles.kept_bytes // 4
    kept = torch.empty(size, dtype=torch.int32, device=scores.device)
    counts = kept
    if parts > 1:
        counts = torch.zeros(n_rows * (1 + parts), dtype=torch.int32, device=scores.device)
    ranged, start, end = bounds_or(result, key_start, key_end)
    # the interpreter has no such option; parts are few programs, and each has more to hold
    registers = tiles.registers if parts == 1 else 1024 // tiles.warps
    most = {"maxnreg": registers} if scores.is_cuda else {}
    launch(
        topk_rows_kernel, (parts, programs),
        scores, start, end, kept, counts, result, start.stride(0), end.stride(0),
        batches[0], rows[0], rows_a_batch, n_rows, q_len, shift, k_len, _stride(width), top_k,
        tiles.target(top_k),
        CAPACITY=tiles.capacity, SAMPLE=tiles.sample,
        BLOCK=tiles.block if parts == 1 else tiles.part_block, PARTS=parts, RANGE=ranged,
        num_warps=tiles.warps, **most,
    )  # fmt: skip
