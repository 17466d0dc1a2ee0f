"""Exact top-k of the indexer's scores, some rows at a time within a fixed budget."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.settings import budget_bytes
from longctx_triton.kernels.index_scores import index_score_kernel
from longctx_triton.kernels.select_rows import choose_rows
from longctx_triton.kernels.topk_rows import topk_rows_kernel
from longctx_triton.launch.device import Device, device_of
from longctx_triton.launch.index_scores import (
    Layout,
    bounds_or,
    layout_of,
    score_plan,
    unpacked,
)
from longctx_triton.launch.prepared import Launches, Prepared
from longctx_triton.launch.scratch import Pieces, scratch
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
    result = weights.new_empty(batch, q_len, top_k, dtype=torch.int32)
    if batch * q_len == 0:
        return result
    device = device_of(q.device)
    unpack = unpacked(q, device.arch)
    plan = _plan(
        layout_of(q, k, weights, k_scale, key_start, key_end), device, top_k, topk_tiles(top_k),
        causal, unpack, budget_bytes("LONGCTX_INDEX_BUDGET_MIB"), q.is_cuda,
    )  # fmt: skip
    if unpack:
        q, k = q.view(torch.uint8), k.view(torch.uint8)
    scores, kept = scratch(q, plan.memory)
    bounds = bounds_or(scores, key_start, key_end)[1:]
    chosen_bounds = bounds_or(result, key_start, key_end)[1:]
    factors = weights if k_scale is None else k_scale
    for piece in plan.pieces:
        if piece.score is None:
            piece.of(result).fill_(-1)
            continue
        if piece.both is None:
            piece.score(index_score_kernel, q, k, weights, factors, *bounds, scores)
            seen = scores[: math.prod(piece.shape)].view(piece.shape)[..., : piece.width]
            choose_rows(seen, None, top_k, piece.of(result), None, 0)
            continue
        counts = kept
        if piece.counts:
            counts = torch.zeros(piece.counts, dtype=torch.int32, device=q.device)
        piece.both(
            (index_score_kernel, topk_rows_kernel), q, k, weights, factors, *bounds, scores,
            *chosen_bounds, kept, counts, result,
        )  # fmt: skip
    return result


class _Piece(NamedTuple):
    """Rows that are scored and chosen of at a time.

    ``score`` is None where no key is seen. ``both`` are the same launch and that of the choice:
    of the scores' inputs, the scores, and what else the choice takes; None where a row's entries
    do not fit a program. ``counts`` are the numbers, zeros first, by which the parts of a row find
    each other.
    """

    batches: tuple[int, int]
    rows: tuple[int, int]
    width: int
    score: Prepared | None
    both: Launches | None
    counts: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the scores, with what lies between rows."""
        (b0, b1), (t0, t1) = self.batches, self.rows
        return b1 - b0, t1 - t0, _stride(self.width)

    def of(self, result: Tensor) -> Tensor:
        """Return these rows of ``result``."""
        return result[slice(*self.batches), slice(*self.rows)]


class _Plan(NamedTuple):
    """Pieces in turn, and the memory of scores and of kept entries that they hold at a time."""

    pieces: tuple[_Piece, ...]
    memory: Pieces


@lru_cache(maxsize=256)
def _plan(
    layout: Layout,
    device: Device,
    top_k: int,
    tiles: TopkTiles | None,
    causal: bool,
    unpack: bool,
    budget: int,
    on_gpu: bool,
) -> _Plan:
    """Cut the rows into pieces that fit the budget; there are rows and entries to choose."""
    batch, q_len = layout.q_shape[:2]
    k_len = layout.k_shape[1]
    programs, rows = _within_budget(tiles, k_len, device.processors, budget)
    rows, batches = min(rows, q_len), max(1, min(rows // q_len, batch, MOST_BATCHES))
    shift = k_len - q_len
    pieces = []
    kept = 0
    for b0 in range(0, batch, batches):
        b1 = min(b0 + batches, batch)
        for t0 in range(0, q_len, rows):
            t1 = min(t0 + rows, q_len)
            width = max(0, min(k_len, t1 + shift) if causal else k_len)
            piece = _Piece((b0, b1), (t0, t1), width, None, None, 0)
            if width:
                score = score_plan(
                    layout, device, causal=causal, unpack=unpack, batches=(b0, b1),
                    rows=(t0, t1), width=width, stride=_stride(width), fill=tiles is None,
                )  # fmt: skip
                piece = piece._replace(score=score)
                if tiles is not None:
                    piece, size = _choosing(
                        piece, score, tiles, layout, device, top_k, programs,
                        shift if causal else k_len, on_gpu,
                    )  # fmt: skip
                    kept = max(kept, size)
            pieces.append(piece)
    scores = batches * rows * _stride(k_len)
    return _Plan(tuple(pieces), ((scores, torch.float32), (kept, torch.int32)))


def _stride(width: int) -> int:
    """Return the distance of two rows of scores: wide loads need multiples of 16 bytes."""
    return -(-width // 16) * 16


def _within_budget(
    tiles: TopkTiles | None, k_len: int, multiprocessors: int, budget: int
) -> tuple[int, int]:
    """Return how many programs choose at a time, and how many rows of scores fit beside them."""
    row_bytes = 4 * max(1, _stride(k_len))
    if tiles is None:
        return 0, max(1, budget // (row_bytes + k_len // 64 + 64))
    fitting = budget // 8 // tiles.kept_bytes
    programs = max(1, min(tiles.resident * multiprocessors, fitting))
    rows = max(1, (budget - programs * tiles.kept_bytes) // row_bytes)
    # every program takes as many rows as the others
    return programs, rows - rows % programs if rows > programs else rows


def _choosing(
    piece: _Piece,
    score: Prepared,
    tiles: TopkTiles,
    layout: Layout,
    device: Device,
    top_k: int,
    programs: int,
    shift: int,
    on_gpu: bool,
) -> tuple[_Piece, int]:
    """Return a piece that also chooses, few rows in parts, and how many numbers that keeps."""
    batches, rows_a_batch, stride = piece.shape
    n_rows = batches * rows_a_batch
    # two programs a multiprocessor keep it busy, and more of them are more to merge
    parts = part_count(n_rows, piece.width, tiles.part_block, min(programs, 2 * device.processors))
    programs = min(programs, n_rows)
    # the interpreter has no such option; parts are few programs, and each has more to hold
    registers = tiles.registers if parts == 1 else 1024 // tiles.warps
    choose = Prepared(
        (parts, programs),
        (
            *(layout.bound_strides or (0, 0)), piece.batches[0], piece.rows[0], rows_a_batch,
            n_rows, layout.q_shape[1], shift, layout.k_shape[1], stride, top_k,
            tiles.target(top_k),
        ),
        {
            "CAPACITY": tiles.capacity, "SAMPLE": tiles.sample,
            "BLOCK": tiles.block if parts == 1 else tiles.part_block, "PARTS": parts,
            "RANGE": layout.bound_strides is not None, "num_warps": tiles.warps,
            **({"maxnreg": registers} if on_gpu else {}),
        },
    )  # fmt: skip
    counts = n_rows * (1 + parts) if parts > 1 else 0
    size = programs * parts * tiles.kept_bytes // 4
    both = Launches((score, (0, 1, 2, 3, 4, 5, 6)), (choose, (6, 7, 8, 9, 10, 11)), given=6)
    return piece._replace(both=both, counts=counts), size
