"""What attention over lists launches, from shapes alone."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from longctx_triton.kernels.merge_parts import merge_plan
from longctx_triton.launch.device import Device
from longctx_triton.launch.dsa_tiles import list_tiles
from longctx_triton.launch.prepared import Launches, Prepared
from longctx_triton.launch.scratch import Pieces
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import signed_scale

__all__ = ["ListPlan", "list_plan"]


class ListPlan(NamedTuple):
    """Launches of one call.

    Attributes
    ----------
    attend : Prepared
        Of ``list_attention_kernel``, over whole lists.
    merged : Launches or None
        The same over parts of lists, and of ``merge_parts_kernel``: of q, k, v, the lists, the
        sinks, the parts' results and log-sum-exps, and the results.
    memory : Pieces
        Of the parts' results and of their log-sum-exps.
    """

    attend: Prepared
    merged: Launches | None
    memory: Pieces


@lru_cache(maxsize=512)
def list_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    one_address: bool,
    indices_shape: tuple[int, ...],
    indices_strides: tuple[int, ...],
    page_size: int,
    scale: float,
    sinks: bool,
    device: Device,
) -> ListPlan:
    """Return the launches.

    Parameters
    ----------
    q_shape, q_strides, k_shape, k_strides, v_shape, v_strides : tuple of int
        Of q, k and v.
    one_address : bool
        Whether k and v begin at the same place.
    indices_shape, indices_strides : tuple of int
        Of the lists ``(batch, q_len, sets, entries)``.
    page_size : int
    scale : float
    sinks : bool
        Whether there are sinks.
    device : Device
    """
    batch, q_len, heads, dim = q_shape
    k_len, kv_heads = k_shape[1:3]
    value_dim = v_shape[3]
    group = heads // kv_heads
    main = max(16, 1 << (dim.bit_length() - 1))
    one_row = one_address and k_strides == v_strides and value_dim == main
    tiles = list_tiles(group, main, padded(value_dim), one_row, device.arch)
    head_tiles = -(-group // tiles.heads)
    programs = batch * q_len * kv_heads * head_tiles
    slots = indices_shape[3] * page_size
    list_blocks = max(1, -(-slots // tiles.keys))
    wanted = min(-(-2 * device.processors // programs), -(-list_blocks // 2))
    wanted = wanted if programs < device.processors else 1
    span = -(-list_blocks // wanted) * tiles.keys
    parts = max(1, -(-slots // span))
    scale_log2, q_factor = signed_scale(scale)
    attend = Prepared(
        (programs, parts),
        (
            *q_strides[:3], *k_strides[:3], *v_strides[:3], *indices_strides[:3],
            batch, q_len, k_len, kv_heads, head_tiles, indices_shape[2], slots, span,
            scale_log2, q_factor,
        ),
        {
            "GROUP": group, "D": min(dim, main), "MAIN": main, "REST": max(dim - main, 0),
            "BLOCK_REST": padded(max(dim - main, 1)), "DV": value_dim,
            "BLOCK_DV": padded(value_dim), "BM": tiles.heads, "BN": tiles.keys,
            "PAGE": page_size, "ONE_ROW": one_row, "SINKS": sinks and parts == 1,
            "LOOK": min(1024, padded(indices_shape[3])),
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        },
    )  # fmt: skip
    if parts == 1:
        return ListPlan(attend, None, ())
    rows = parts * math.prod(q_shape[:3])
    merge = merge_plan(parts, (batch, q_len, heads, value_dim), sinks)
    merged = Launches((attend, (0, 1, 2, 3, 4, 5, 6)), (merge, (5, 6, 4, 7, 8)), given=5)
    return ListPlan(attend, merged, ((rows * value_dim, torch.float32), (rows, torch.float32)))
