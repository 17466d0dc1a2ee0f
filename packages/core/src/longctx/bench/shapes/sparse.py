"""Standard shapes on a GPU of the ops that choose keys: indexer, plans, star, token sets."""

from __future__ import annotations

from collections.abc import Iterator

from longctx.bench.case import Case, axes

__all__ = ["CASES"]

K = 1024

_HEADS = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}


def _indexer_cases() -> Iterator[Case]:
    # DeepSeek-V3.2: 64 indexer heads of 128, the best 2048 keys
    for rows in (8 * K * 64, 128 * K):
        yield Case("quantize_fp8", "indexer", axes(rows=rows, channels=128))
    heads = {"index_heads": 64, "index_dim": 128}
    prefill = {"batch": 1, "q_len": 8 * K, "k_len": 64 * K, **heads}
    decode = {"batch": 1, "q_len": 1, "k_len": 128 * K, **heads}
    yield Case("index_scores", "prefill", axes(**prefill), dtype="fp8_e4m3")
    for grid, sizes in (("prefill", prefill), ("decode", decode)):
        yield Case("index_topk", grid, axes(**sizes, top_k=2048), dtype="fp8_e4m3")


def _topk_cases() -> Iterator[Case]:
    # absorbed MLA: one KV head of 576 channels, whose first 512 are the values
    mla = {"q_heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "top_k": 2048}
    yield Case("topk_attention", "prefill", axes(batch=1, q_len=4 * K, k_len=128 * K, **mla))
    yield Case("topk_attention", "decode", axes(batch=128, q_len=1, k_len=32 * K, **mla))


def _plan_cases() -> Iterator[Case]:
    op = "block_sparse_attention"
    for seq in (64 * K, 128 * K):
        sizes = {"batch": 1, "seq": seq, **_HEADS}
        for density in (0.05, 0.1, 0.25):
            blocks = axes(**sizes, block=128)
            yield Case(op, "blocks", blocks, plan="block", density=density)
        yield Case(op, "stripes", axes(**sizes, columns=1024, diagonals=1024), plan="stripe")
        # MInference's A-shape: 128 first tokens and 3968 recent ones
        yield Case(op, "window", axes(**sizes, sink_tokens=128), plan="window", window=3967)


def _star_cases() -> Iterator[Case]:
    size = 16 * K
    context = axes(batch=1, seq=128 * K, **_HEADS, block_size=size, anchor_size=size)
    yield Case("star_context_attention", "phase-1", context)
    for q_len in (1, 64):
        shards = axes(batch=1, q_len=q_len, shards=8, shard_len=size, **_HEADS)
        yield Case("star_query_attention", "phase-2", shards)


def _token_cases() -> Iterator[Case]:
    grid, seq = "token-sparse", 128 * K
    scores = axes(batch=1, window_queries=128, k_len=seq, **_HEADS)
    yield Case("token_scores", grid, scores)
    sets = axes(batch=1, heads=32, prefix_len=seq - 128, recent=128)
    yield Case("select_tokens", grid, sets, dtype="fp32")
    for density in (0.25, 0.5):
        sizes = axes(batch=1, seq=seq, **_HEADS)
        yield Case("token_sparse_attention", grid, sizes, density=density)


CASES = (
    *_indexer_cases(),
    *_topk_cases(),
    *_plan_cases(),
    *_star_cases(),
    *_token_cases(),
)
"""All of them, in the order in which they are run."""
