"""Launch parameters of the DSA kernels, by shape and architecture."""

from __future__ import annotations

from typing import NamedTuple

from longctx_triton.launch.device import SMALL_SHARED
from longctx_triton.launch.sizes import padded
from longctx_triton.launch.tuning import tuned

__all__ = [
    "IndexTiles",
    "ListTiles",
    "index_backward_tiles",
    "index_tiles",
    "list_tiles",
]


class IndexTiles(NamedTuple):
    """Tiles of the indexer: ``queries * block_heads`` columns against ``keys`` rows."""

    queries: int
    block_heads: int
    keys: int
    warps: int
    stages: int


class ListTiles(NamedTuple):
    """Tiles of the attention over lists: heads of one token against gathered keys."""

    heads: int
    keys: int
    warps: int
    stages: int


@tuned("index_scores", apart=("q_len",))
def index_tiles(heads: int, q_len: int, arch: tuple[int, int]) -> IndexTiles:
    """Return the tiles of the indexer for a number of index heads and of queries."""
    block_heads = padded(heads, 1)
    queries = max(16 // block_heads, 1, min(128 // block_heads, padded(q_len, 1)))
    if arch == (0, 0):
        return IndexTiles(max(16 // block_heads, min(queries, 2)), block_heads, 32, 4, 1)
    return IndexTiles(queries, block_heads, 128, 8, 2 if arch in SMALL_SHARED else 3)


@tuned("index_backward")
def index_backward_tiles(heads: int, dim: int, arch: tuple[int, int]) -> IndexTiles:
    """Return the tiles of the indexer's gradients: 128 (query, head) pairs against 64 keys."""
    block_heads = padded(heads, 1)
    if arch == (0, 0):
        return IndexTiles(max(1, 32 // block_heads), block_heads, 32, 4, 1)
    rows = 128 if dim <= 128 else 64
    stages = 1 if arch in SMALL_SHARED else 2
    return IndexTiles(max(1, rows // block_heads), block_heads, 64, 8, stages)


@tuned("topk_attention")
def list_tiles(
    group: int, channels: int, value_dim: int, one_row: bool, arch: tuple[int, int]
) -> ListTiles:
    """Return the tiles of the attention over lists.

    Parameters
    ----------
    group : int
        Query heads a KV head.
    channels, value_dim : int
        Channels of the first part of a key, and of a value.
    one_row : bool
        Whether the values are the first part of the keys' memory.
    arch : (int, int)
        Compute capability; (0, 0) for Triton's interpreter.
    """
    heads = min(64, padded(group))
    if arch == (0, 0):
        return ListTiles(heads, 32, 4, 1)
    if max(channels, value_dim) >= 256:
        keys = 64 if one_row and arch >= (9, 0) else 32
        keys = 16 if arch in SMALL_SHARED else keys
        stages = 2 if one_row or arch >= (9, 0) else 1
        return ListTiles(heads, keys, 8 if heads == 64 else 4, stages)
    return ListTiles(heads, 64, 4, 2 if arch in SMALL_SHARED else 3)
