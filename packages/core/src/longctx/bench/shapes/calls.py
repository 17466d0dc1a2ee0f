"""Shapes so small that a call's time is the host's: every op, as a loop over layers calls it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from longctx.bench.case import Case, axes

__all__ = ["CASES", "GRID"]

GRID = "call"
"""Their grid, which only runs where it is asked for by name."""

K = 1024

_HEADS = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
_PREFILL = {"batch": 1, "seq": 128, **_HEADS}
_DECODE = {"batch": 1, "q_len": 1, "k_len": 4 * K}

_call = partial(Case, grid=GRID)


def _dense_cases() -> Iterator[Case]:
    yield _call("decode_attention", axes=axes(**_DECODE, **_HEADS, page_size=0))
    yield _call("merge_attention", axes=axes(parts=8, batch=1, seq=1, q_heads=32, head_dim=128))
    prefill = partial(_call, "flash_attention")
    yield prefill(axes=axes(**_PREFILL))
    yield prefill(axes=axes(**_PREFILL), window=32)
    yield prefill(axes=axes(batch=1, seq=128, sequences=2, **_HEADS))
    yield prefill(axes=axes(**_PREFILL), dtype="fp8_e4m3")
    yield _call("lightning_attention", axes=axes(batch=1, seq=256, heads=64, head_dim=128))
    yield _call("lightning_decode", axes=axes(batch=1, heads=64, head_dim=128))


def _indexer_cases() -> Iterator[Case]:
    indexer = {**_DECODE, "index_heads": 64, "index_dim": 128}
    yield _call("quantize_fp8", axes=axes(rows=64, channels=128))
    yield _call("index_scores", axes=axes(**indexer))
    yield _call("index_topk", axes=axes(**indexer, top_k=512))
    mla = {"q_heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512}
    for heads in (_HEADS, mla):
        yield _call("topk_attention", axes=axes(**_DECODE, **heads, top_k=512))


def _sparse_cases() -> Iterator[Case]:
    sparse = partial(_call, "block_sparse_attention")
    yield sparse(axes=axes(**_PREFILL, block=128), plan="block", density=1.0)
    yield sparse(axes=axes(**_PREFILL, sink_tokens=4), plan="window", window=32)
    yield sparse(axes=axes(**_PREFILL, columns=4, diagonals=4), plan="stripe")
    context = axes(**_PREFILL, block_size=64, anchor_size=64)
    yield _call("star_context_attention", axes=context)
    shards = axes(batch=1, q_len=1, shards=2, shard_len=4 * K, **_HEADS)
    yield _call("star_query_attention", axes=shards)
    yield _call("token_scores", axes=axes(batch=1, window_queries=64, k_len=4 * K, **_HEADS))
    sets = axes(batch=1, heads=32, prefix_len=4 * K, recent=128)
    yield _call("select_tokens", axes=sets, dtype="fp32")
    yield _call("token_sparse_attention", axes=axes(**_PREFILL), density=1.0)


CASES = (*_dense_cases(), *_indexer_cases(), *_sparse_cases())
"""All of them, in the order in which they are run; the same on every device."""
