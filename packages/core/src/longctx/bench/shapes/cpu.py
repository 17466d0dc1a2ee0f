"""Standard shapes on a CPU: every op in seconds, flash against PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from longctx.bench.case import Case, axes

__all__ = ["CASES"]

K = 1024

_GQA = {"q_heads": 4, "kv_heads": 2, "head_dim": 64}

_cpu = partial(Case, grid="cpu", dtype="fp32")


def _dense_cases() -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        for kv_heads in (4, 1):
            for seq in (K, 2 * K, 4 * K):
                for causal in (False, True):
                    sizes = axes(batch=1, seq=seq, q_heads=4, kv_heads=kv_heads, head_dim=64)
                    yield _cpu("flash_attention", axes=sizes, dtype=dtype, causal=causal)
    yield _cpu("flash_attention", axes=axes(batch=1, seq=2 * K, **_GQA), window=256)
    yield _cpu("flash_attention", axes=axes(batch=1, seq=K, **_GQA), backward=True)
    for page_size, kv_dtype in ((0, ""), (16, ""), (0, "fp8_e4m3")):
        for batch, k_len in ((1, 4 * K), (4, 4 * K), (1, 32 * K)):
            sizes = axes(batch=batch, q_len=1, k_len=k_len, **_GQA, page_size=page_size)
            yield _cpu("decode_attention", axes=sizes, kv_dtype=kv_dtype)
    yield _cpu("merge_attention", axes=axes(parts=8, batch=1, seq=256, q_heads=4, head_dim=64))
    for backward in (False, True):
        for seq in (K, 4 * K, 16 * K):
            sizes = axes(batch=1, seq=seq, heads=4, head_dim=64)
            yield _cpu("lightning_attention", axes=sizes, dtype="bf16", backward=backward)
    yield _cpu("lightning_decode", axes=axes(batch=8, heads=8, head_dim=64))


def _sparse_cases() -> Iterator[Case]:
    yield _cpu("quantize_fp8", axes=axes(rows=4 * K, channels=128))
    chosen = {"index_scores": {}, "index_topk": {"top_k": 128}}
    for op, extra in chosen.items():
        for q_len, k_len in ((256, 2 * K), (1, 16 * K)):
            sizes = axes(batch=1, q_len=q_len, k_len=k_len, index_heads=4, index_dim=64, **extra)
            yield _cpu(op, axes=sizes, dtype="fp8_e4m3")
    mla = {"q_heads": 16, "kv_heads": 1, "head_dim": 576, "value_dim": 512}
    for batch, q_len in ((1, 64), (4, 1)):
        sizes = axes(batch=batch, q_len=q_len, k_len=2 * K, **mla, top_k=128)
        yield _cpu("topk_attention", axes=sizes)
    context = {"batch": 1, "seq": 2 * K, **_GQA}
    sparse = partial(_cpu, "block_sparse_attention")
    for density in (0.1, 0.25):
        yield sparse(axes=axes(**context, block=128), plan="block", density=density)
    yield sparse(axes=axes(**context, columns=64, diagonals=64), plan="stripe")
    yield sparse(axes=axes(**context, sink_tokens=16), plan="window", window=255)
    yield _cpu("star_context_attention", axes=axes(**context, block_size=512, anchor_size=512))
    shards = axes(batch=1, q_len=16, shards=4, shard_len=512, **_GQA)
    yield _cpu("star_query_attention", axes=shards)
    yield _cpu("token_scores", axes=axes(batch=1, window_queries=32, k_len=4 * K, **_GQA))
    yield _cpu("select_tokens", axes=axes(batch=1, heads=4, prefix_len=4 * K - 32, recent=32))
    yield _cpu("token_sparse_attention", axes=axes(**context), density=0.5)


CASES = (*_dense_cases(), *_sparse_cases())
"""All of them, in the order in which they are run."""
