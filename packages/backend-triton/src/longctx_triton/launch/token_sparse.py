"""What scoring, choosing and attending of tokens launch, from shapes alone."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from longctx_triton.kernels.select_rows import CHUNK, choose_plans, found_size
from longctx_triton.launch.clear_rows import clearing
from longctx_triton.launch.device import SMALL_SHARED, Device
from longctx_triton.launch.prepared import Launches, Prepared
from longctx_triton.launch.scratch import Pieces
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import attention_tiles, signed_scale, token_tiles

__all__ = ["MassPlan", "ScorePlan", "attend_plan", "mass_plan", "score_plan"]


class ScorePlan(NamedTuple):
    """Launches of one call of the scorer.

    Attributes
    ----------
    score : Launches
        Of ``statistics_kernel``, ``merge_statistics_kernel``, ``share_kernel`` and, if anything is
        pooled, ``pool_kernel``: of the queries, the keys, the memory and the scores.
    memory : Pieces
        Of partial sums, of their totals and, where they are pooled, of shares.
    """

    score: Launches
    memory: Pieces


@lru_cache(maxsize=512)
def score_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    pool: int,
    scale: float,
    device: Device,
) -> ScorePlan:
    """Return the launches that score; there are tokens to score.

    Parameters
    ----------
    q_shape, q_strides : tuple of int
        Of the recent queries ``(batch, window, q_heads, head_dim)``.
    k_shape, k_strides : tuple of int
        Of the keys ``(batch, k_len, kv_heads, head_dim)``.
    pool : int
    scale : float
    device : Device
    """
    batch, window, heads, head_dim = q_shape
    k_len, kv_heads = k_shape[1:3]
    group, prefix = heads // kv_heads, k_len - window
    rows = attention_tiles(head_dim, head_dim, device.arch, window * group)
    columns = attention_tiles(head_dim, head_dim, device.arch, 64)
    units = batch * kv_heads
    row_tiles = -(-window * group // rows.queries)
    key_tiles = -(-k_len // rows.keys)
    wanted = max(1, min(-(-2 * device.processors // (units * row_tiles)), key_tiles // 4))
    span = -(-key_tiles // wanted) * rows.keys
    parts = -(-k_len // span)
    scale_log2, q_factor = signed_scale(scale)
    strides = (*q_strides[:3], *k_strides[:3])
    shape = {"GROUP": group, "D": head_dim, "BLOCK_D": padded(head_dim)}
    key_block = 32 if device.interpreted else 64 if device.arch in SMALL_SHARED else 128
    memory = [batch * heads * parts * window, batch * heads * window]
    statistics = Prepared(
        (units * row_tiles, parts),
        (*strides, window, k_len, units, kv_heads, span, scale_log2, q_factor),
        {
            **shape, "BM": rows.queries, "BN": rows.keys,
            "num_warps": rows.warps, "num_stages": rows.stages,
        },
    )  # fmt: skip
    merge = Prepared((batch * heads,), (window, parts), {"BLOCK_W": 128})
    share = Prepared(
        (units * -(-prefix // key_block),),
        (*strides, window, prefix, units, kv_heads, scale_log2, q_factor),
        {
            **shape, "BW": min(64, padded(window)), "BN": key_block,
            "num_warps": 4, "num_stages": columns.stages,
        },
    )  # fmt: skip
    steps = [(statistics, (0, 1, 2)), (merge, (2, 3)), (share, (0, 1, 3, 4))]
    if pool > 1:
        memory.append(batch * heads * prefix)
        grid = (batch * heads, -(-prefix // CHUNK))
        steps.append((Prepared(grid, (prefix,), {"POOL": pool, "BLOCK": CHUNK}), (4, 5)))
    return ScorePlan(Launches(*steps, given=2), tuple((count, torch.float32) for count in memory))


class MassPlan(NamedTuple):
    """Launches that find how many tokens to keep.

    Attributes
    ----------
    choose : Launches
        Of ``head_mean_kernel``, ``keep_count_kernel``, ``row_threshold_kernel`` and
        ``row_emit_kernel``: of the scores, the memory, the indices and the counts.
    memory : Pieces
        Of mean scores, of their sums, of the numbers to keep, and of what is found of each row.
    """

    choose: Launches
    memory: Pieces


@lru_cache(maxsize=512)
def mass_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    drop_mass: float,
    min_tokens: int,
    recent: int,
) -> MassPlan:
    """Return the launches for scores ``(batch, heads, length)`` of these strides."""
    batch, heads, length = shape
    chunks = -(-length // CHUNK)
    means = Prepared((chunks, batch), (*strides[:2], length, heads), {"BLOCK": CHUNK})
    keep = Prepared(
        (batch,),
        (length, chunks, math.ceil(drop_mass * 2**52), min_tokens),
        {"BLOCK": 4096, "num_warps": 16},
    )
    threshold, emit = choose_plans(shape, strides, 0, length + recent, recent, True, True)
    return MassPlan(
        Launches((means, (0, 1, 2)), (keep, (1, 2, 3)), (threshold, (0, 3, 4)),
                 (emit, (0, 4, 5, 6)), given=1),
        (
            (batch * length, torch.float64), (batch * chunks, torch.float64),
            (batch, torch.int32), (found_size(batch, heads, length), torch.int32),
        ),
    )  # fmt: skip


@lru_cache(maxsize=512)
def attend_plan(
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
) -> Launches:
    """Return the launches of ``clear_rows_kernel`` and ``token_set_attention_kernel``.

    They take q, k, v, the sets, the results and a counter. ``indices_shape`` is ``(batch, sets,
    capacity)``.
    """
    batch, q_len, heads, head_dim = q_shape
    k_len, kv_heads, value_dim = v_shape[1:]
    _, sets, capacity = indices_shape
    tiles = token_tiles(head_dim, value_dim, device.arch, capacity)
    scale_log2, q_factor = signed_scale(scale)
    attend = Prepared(
        (batch * heads * -(-capacity // tiles.queries),),
        (
            *q_strides[:3], *k_strides[:3], *v_strides[:3], *index_strides[:2], count_strides[0],
            q_len, k_len, batch * heads, heads, heads // kv_heads, heads // sets, capacity,
            scale_log2, q_factor,
        ),
        {
            "D": head_dim, "DV": value_dim,
            "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(value_dim),
            "SIGNED": q_factor != 1.0, "BM": tiles.queries, "BN": tiles.keys,
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        },
    )  # fmt: skip
    return Launches(
        (clearing((batch, q_len, heads, value_dim)), (5, 6, 7)),
        (attend, (0, 1, 2, 5, 6, 3, 4)),
        given=5,
    )
