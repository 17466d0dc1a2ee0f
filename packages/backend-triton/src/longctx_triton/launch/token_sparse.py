"""What scoring, choosing and attending of tokens launch, from shapes alone."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from longctx_triton.kernels.select_rows import CHUNK
from longctx_triton.launch.device import SMALL_SHARED, Device
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import aligned, padded
from longctx_triton.launch.sparse_tiles import attention_tiles, signed_scale, token_tiles

__all__ = ["MassPlan", "ScorePlan", "attend_plan", "mass_plan", "score_plan"]


class ScorePlan(NamedTuple):
    """Launches of one call of the scorer.

    Attributes
    ----------
    statistics, merge, share : Prepared
        Of the kernels of these names.
    pool : Prepared or None
        Of ``pool_kernel``; None where nothing is pooled.
    memory : tuple of int
        Numbers, fp32, of partial sums, of their totals and, where they are pooled, of shares.
    """

    statistics: Prepared
    merge: Prepared
    share: Prepared
    pool: Prepared | None
    memory: tuple[int, ...]


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
    memory = [aligned(batch * heads * parts * window), aligned(batch * heads * window)]
    pooled = None
    if pool > 1:
        memory.append(batch * heads * prefix)
        grid = (batch * heads, -(-prefix // CHUNK))
        pooled = Prepared(grid, (prefix,), {"POOL": pool, "BLOCK": CHUNK})
    return ScorePlan(
        Prepared(
            (units * row_tiles, parts),
            (*strides, window, k_len, units, kv_heads, span, scale_log2, q_factor),
            {
                **shape, "BM": rows.queries, "BN": rows.keys,
                "num_warps": rows.warps, "num_stages": rows.stages,
            },
        ),
        Prepared((batch * heads,), (window, parts), {"BLOCK_W": 128}),
        Prepared(
            (units * -(-prefix // key_block),),
            (*strides, window, prefix, units, kv_heads, scale_log2, q_factor),
            {
                **shape, "BW": min(64, padded(window)), "BN": key_block,
                "num_warps": 4, "num_stages": columns.stages,
            },
        ),
        pooled,
        tuple(memory),
    )  # fmt: skip


class MassPlan(NamedTuple):
    """Launches that find how many tokens to keep.

    Attributes
    ----------
    means, keep : Prepared
        Of ``head_mean_kernel`` and ``keep_count_kernel``.
    memory : tuple of int
        Numbers, fp64, of mean scores and of their sums.
    """

    means: Prepared
    keep: Prepared
    memory: tuple[int, int]


@lru_cache(maxsize=512)
def mass_plan(
    shape: tuple[int, ...], strides: tuple[int, ...], drop_mass: float, min_tokens: int
) -> MassPlan:
    """Return the launches for scores ``(batch, heads, length)`` of these strides."""
    batch, heads, length = shape
    chunks = -(-length // CHUNK)
    return MassPlan(
        Prepared((chunks, batch), (*strides[:2], length, heads), {"BLOCK": CHUNK}),
        Prepared(
            (batch,),
            (length, chunks, math.ceil(drop_mass * 2**52), min_tokens),
            {"BLOCK": 4096, "num_warps": 16},
        ),
        (aligned(batch * length), batch * chunks),
    )


@lru_cache(maxsize=512)
def attend_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    indices_shape: tuple[int, ...],
    set_strides: tuple[int, int, int],
    scale: float,
    device: Device,
) -> Prepared:
    """Return the launch of ``token_set_attention_kernel``.

    ``indices_shape`` is ``(batch, sets, capacity)``; ``set_strides`` are the first two of the
    indices and the first of the counts.
    """
    batch, q_len, heads, head_dim = q_shape
    k_len, kv_heads, value_dim = v_shape[1:]
    _, sets, capacity = indices_shape
    tiles = token_tiles(head_dim, value_dim, device.arch, capacity)
    scale_log2, q_factor = signed_scale(scale)
    return Prepared(
        (batch * heads * -(-capacity // tiles.queries),),
        (
            *q_strides[:3], *k_strides[:3], *v_strides[:3], *set_strides,
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
