"""What portable attention over first keys and one run of keys launches, from shapes alone."""

from __future__ import annotations

from functools import lru_cache

from longctx_triton.launch.device import Device
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.sparse_tiles import signed_scale, star_tiles, window_tiles

__all__ = ["range_plan"]


@lru_cache(maxsize=512)
def range_plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    scale: float,
    device: Device,
    *,
    window: int = 0,
    anchor: int = 0,
    last_queries: int = 0,
    block: int | None = None,
    head_windows: bool = False,
) -> Prepared:
    """Return the launch of ``range_attention_kernel``; there are query rows.

    Parameters
    ----------
    q_shape, q_strides, k_shape, k_strides, v_shape, v_strides : tuple of int
        Of q, k and v.
    scale : float
    device : Device
    window : int
        Earlier keys of the run.
    anchor : int
        First keys that every query sees.
    last_queries : int
        Last query rows that see everything.
    block : int, optional
        The run begins where the query's block of so many positions does, and tiles of queries
        begin there, too, so that none spans two blocks.
    head_windows : bool
        Whether heads have windows of their own.
    """
    batch, q_len, heads, head_dim = q_shape
    k_len, kv_heads = k_shape[1:3]
    value_dim = v_shape[3]
    if block is None:
        tiles = window_tiles(head_dim, value_dim, device.arch, q_len)
        origin, span, tiles_a_block = k_len - q_len, q_len, -(-q_len // tiles.queries)
        row_tiles, anchor = tiles_a_block, min(anchor, k_len)
    else:
        span = min(block, k_len)
        tiles = star_tiles(head_dim, value_dim, device.arch, min(span, q_len))
        origin = (k_len - q_len) // span * span
        tiles_a_block = -(-span // tiles.queries)
        row_tiles, anchor = -(-(k_len - origin) // span) * tiles_a_block, min(anchor, span)
    scale_log2, q_factor = signed_scale(scale)
    return Prepared(
        (batch * heads * row_tiles,),
        (
            *q_strides[:3], *k_strides[:3], *v_strides[:3],
            q_len, k_len, batch * heads, heads, heads // kv_heads,
            origin, span, tiles_a_block, anchor, min(window, k_len), min(last_queries, q_len),
            scale_log2, q_factor,
        ),
        {
            "D": head_dim, "DV": value_dim, "BLOCK_D": padded(head_dim),
            "BLOCK_DV": padded(value_dim), "SIGNED": q_factor != 1.0,
            "BM": tiles.queries, "BN": tiles.keys, "BY_BLOCK": block is not None,
            "HEAD_WINDOWS": head_windows,
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        },
    )  # fmt: skip
