"""What star attention's second phase launches, from shapes alone."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from longctx_triton.launch.device import Device
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import attention_tiles, signed_scale

__all__ = ["ShardLaunch", "StarQueryPlan", "star_query_plan"]

LEAST_TILES = 4
"""Key tiles that are worth a part of their own."""


class ShardLaunch(NamedTuple):
    """The launch of ``star_query_kernel`` over one shard, and the shard's number."""

    attend: Prepared
    number: int


class StarQueryPlan(NamedTuple):
    """Launches of one call.

    Attributes
    ----------
    shards : tuple of ShardLaunch
        Of the shards that hold keys.
    parts : int
        Parts of all shards, which are merged at the end; 0 where every shard goes on from the
        result of the one before.
    memory : tuple of int
        Numbers, fp32, of every shard's partial results, then of their log-sum-exps.
    """

    shards: tuple[ShardLaunch, ...]
    parts: int
    memory: tuple[int, ...]


@lru_cache(maxsize=512)
def star_query_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shapes: tuple[tuple[int, ...], ...],
    k_strides: tuple[tuple[int, ...], ...],
    v_strides: tuple[tuple[int, ...], ...],
    value_dim: int,
    query_shard: int,
    scale: float,
    device: Device,
) -> StarQueryPlan:
    """Return the launches; there are query rows.

    Parameters
    ----------
    q_shape, q_strides : tuple of int
        Of the queries.
    k_shapes : tuple of shapes
        Of the shards' keys ``(batch, shard_len, kv_heads, head_dim)``.
    k_strides, v_strides : tuple of strides
        Of each shard's keys and values.
    value_dim : int
    query_shard : int
        The shard in which attention is causal.
    scale : float
    device : Device
    """
    batch, q_len, heads, head_dim = q_shape
    kv_heads = k_shapes[0][2]
    group = heads // kv_heads
    rows = q_len * group
    tiles = attention_tiles(head_dim, value_dim, device.arch, rows)
    units = batch * kv_heads * -(-rows // tiles.queries)
    most_parts = -(-2 * device.processors // units)
    numbers = [n for n, shape in enumerate(k_shapes) if shape[1]]
    chained = units >= device.processors or (len(numbers) == 1 and most_parts == 1)
    scale_log2, q_factor = signed_scale(scale)
    shards, parts = [], []
    for n in numbers:
        k_len = k_shapes[n][1]
        n_parts, span = 1, k_len
        if not chained:
            key_tiles = -(-k_len // tiles.keys)
            wanted = max(1, min(most_parts, key_tiles // LEAST_TILES))
            span = -(-key_tiles // wanted) * tiles.keys
            n_parts = -(-k_len // span)
        parts.append(n_parts)
        attend = Prepared(
            (units, n_parts),
            (
                *q_strides[:3], *k_strides[n][:3], *v_strides[n][:3],
                q_len, k_len, batch, batch * kv_heads, kv_heads, span, scale_log2, q_factor,
            ),
            {
                "GROUP": group, "D": head_dim, "DV": value_dim,
                "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(value_dim),
                "SIGNED": q_factor != 1.0, "BM": tiles.queries, "BN": tiles.keys,
                "CAUSAL": n == query_shard, "RESUME": chained and n != numbers[0],
                "num_warps": tiles.warps, "num_stages": tiles.stages,
            },
        )  # fmt: skip
        shards.append(ShardLaunch(attend, n))
    if chained:
        return StarQueryPlan(tuple(shards), 0, ())
    entries = batch * q_len * heads
    memory = (*(p * entries * value_dim for p in parts), *(p * entries for p in parts))
    return StarQueryPlan(tuple(shards), sum(parts), memory)
