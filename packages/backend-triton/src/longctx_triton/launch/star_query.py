"""What star attention's second phase launches, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_triton.kernels.merge_parts import merge_plan
from longctx_triton.launch.device import Device
from longctx_triton.launch.prepared import Launches, Prepared
from longctx_triton.launch.scratch import Pieces
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import attention_tiles, signed_scale

__all__ = ["ShardLaunch", "StarQueryPlan", "star_query_plan"]

LEAST_TILES = 4
"""Key tiles that are worth a part of their own."""
MOST_SHARDS = 4
"""Shards of one launch."""


class ShardLaunch(NamedTuple):
    """The launch of ``star_query_kernel`` over some shards, and their numbers."""

    attend: Prepared
    numbers: tuple[int, ...]

    def inputs(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor | None]:
        """Return keys and values of the shards, and None for those that there might be."""
        found: list[Tensor | None] = []
        for n in self.numbers:
            found += (keys[n], values[n])
        return found + [None] * (2 * MOST_SHARDS - len(found))


class StarQueryPlan(NamedTuple):
    """Launches of one call.

    Attributes
    ----------
    shards : tuple of ShardLaunch
        Of the shards that hold keys.
    merged : Launches or None
        Of their parts, and of ``merge_parts_kernel``: of q, every shard's keys and values, the
        parts' results and log-sum-exps, the results, and None for shards that a launch might
        take. None where every shard goes on from the result of the one before.
    memory : Pieces
        Of the parts' results, then of their log-sum-exps.
    """

    shards: tuple[ShardLaunch, ...]
    merged: Launches | None
    memory: Pieces


@lru_cache(maxsize=512)
def star_query_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    layout: tuple[tuple[int, ...], ...],
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
    layout : tuple of tuple of int
        Of each shard the shape ``(batch, shard_len, kv_heads, head_dim)`` and the strides of its
        keys, then the strides of its values.
    value_dim : int
    query_shard : int
        The shard in which attention is causal.
    scale : float
    device : Device
    """
    k_shapes, k_strides, v_strides = layout[::3], layout[1::3], layout[2::3]
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
    shards = []
    parts = 0
    for together in [[n] for n in numbers] if chained else _alike(numbers, k_strides, v_strides):
        lengths = [k_shapes[n][1] for n in together]
        span, ends = lengths[0], [1]
        if not chained:
            span = _span(max(lengths), tiles.keys, most_parts)
            ends = list(accumulate(-(-length // span) for length in lengths))
        first, spare = together[0], (0,) * (MOST_SHARDS - len(together))
        attend = Prepared(
            (units, ends[-1]),
            (
                *q_strides[:3], *k_strides[first][:3], *v_strides[first][:3],
                q_len, *lengths, *spare, parts, *ends[:-1], *spare,
                batch, batch * kv_heads, kv_heads, span, scale_log2, q_factor,
            ),
            {
                "GROUP": group, "D": head_dim, "DV": value_dim,
                "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(value_dim),
                "SIGNED": q_factor != 1.0, "BM": tiles.queries, "BN": tiles.keys,
                "SHARDS": len(together),
                "CAUSAL": together.index(query_shard) if query_shard in together else -1,
                "RESUME": chained and first != numbers[0],
                "num_warps": tiles.warps, "num_stages": tiles.stages,
            },
        )  # fmt: skip
        shards.append(ShardLaunch(attend, tuple(together)))
        parts += 0 if chained else ends[-1]
    if chained:
        return StarQueryPlan(tuple(shards), None, ())
    steps = []
    end = 1 + 2 * len(k_shapes)
    for shard in shards:
        inputs = [place for n in shard.numbers for place in (2 * n + 1, 2 * n + 2)]
        inputs += [end + 4] * (2 * MOST_SHARDS - len(inputs))
        steps.append((shard.attend, (0, *inputs, end, end + 1, end, end + 1)))
    merge = merge_plan(parts, (batch, q_len, heads, value_dim), False)
    steps.append((merge, (end, end + 1, end + 3, end + 2, end + 3)))
    rows = parts * batch * q_len * heads
    memory = ((rows * value_dim, torch.float32), (rows, torch.float32))
    return StarQueryPlan(tuple(shards), Launches(*steps, given=end), memory)


def _alike(
    numbers: list[int],
    k_strides: tuple[tuple[int, ...], ...],
    v_strides: tuple[tuple[int, ...], ...],
) -> list[list[int]]:
    """Return shards that one launch takes: neighbours of the same strides."""
    found: list[list[int]] = []
    for n in numbers:
        last = found[-1] if found else []
        if (
            last
            and len(last) < MOST_SHARDS
            and ((k_strides[n], v_strides[n]) == (k_strides[last[0]], v_strides[last[0]]))
        ):
            last.append(n)
        else:
            found.append([n])
    return found


def _span(k_len: int, tile: int, most_parts: int) -> int:
    """Return how many keys of a shard a part takes."""
    tiles = -(-k_len // tile)
    wanted = max(1, min(most_parts, tiles // LEAST_TILES))
    return -(-tiles // wanted) * tile
