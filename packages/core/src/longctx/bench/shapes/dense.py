"""Standard shapes on a GPU of the ops that look at every key: flash, decode, lightning."""

from __future__ import annotations

from collections.abc import Iterator

from longctx.bench.case import Case, axes

__all__ = ["CASES"]

K = 1024
M = 1024 * K

_MHA_128 = {"q_heads": 32, "kv_heads": 32, "head_dim": 128}
_MHA_64 = {"q_heads": 64, "kv_heads": 64, "head_dim": 64}
_GQA = {"q_heads": 64, "kv_heads": 8, "head_dim": 128}


def _flash_cases() -> Iterator[Case]:
    op = "flash_attention"
    # FlashAttention-3 (arXiv 2407.08608, section 4.1): 16K tokens in all, hidden size 2048
    for head_dim in (64, 128, 256):
        heads = 2048 // head_dim
        for causal in (False, True):
            for seq in (512, K, 2 * K, 4 * K, 8 * K, 16 * K):
                shape = {"q_heads": heads, "kv_heads": heads, "head_dim": head_dim}
                sizes = axes(batch=16 * K // seq, seq=seq, **shape)
                yield Case(op, "fa3", sizes, causal=causal)
    # cuDNN's SDPA benchmark: grouped heads, one sequence
    for seq in (2 * K, 4 * K, 8 * K, 16 * K, 32 * K):
        yield Case(op, "cudnn", axes(batch=1, seq=seq, **_GQA))
    for seq in (16 * K, 64 * K, 128 * K):
        for shape in (_MHA_128, _MHA_64, _GQA):
            yield Case(op, "prefill", axes(batch=1, seq=seq, **shape))
    yield Case(op, "prefill", axes(batch=1, seq=64 * K, **_MHA_128), window=4096)
    fp8 = axes(batch=1, seq=16 * K, **_MHA_128)
    yield Case(op, "prefill", fp8, dtype="fp8_e4m3", causal=False)
    for seq in (4 * K, 16 * K):
        for shape, batch in ((_MHA_128, 16 * K // seq), (_MHA_64, 16 * K // seq), (_GQA, 1)):
            sizes = axes(batch=batch, seq=seq, **shape)
            yield Case(op, "backward", sizes, backward=True)


def _decode_cases() -> Iterator[Case]:
    heads = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
    for grid, page_size in (("contiguous", 0), ("paged", 16)):
        for kv_dtype in ("bf16", "fp8_e4m3"):
            for batch in (1, 8, 32):
                for k_len in (4 * K, 32 * K, 128 * K, M):
                    sizes = axes(batch=batch, q_len=1, k_len=k_len, **heads, page_size=page_size)
                    yield Case("decode_attention", grid, sizes, kv_dtype=kv_dtype)
    row = {"q_heads": 32, "head_dim": 128}
    yield Case("merge_attention", "split-kv", axes(parts=32, batch=8, seq=1, **row))
    yield Case("merge_attention", "shards", axes(parts=8, batch=1, seq=16 * K, **row))


def _lightning_cases() -> Iterator[Case]:
    # the six shapes of flash-linear-attention's benchmarks/ops/registry.py, and long prefill
    fla = (
        (1, 8 * K, 96, 128),
        (2, 16 * K, 16, 128),
        (4, 2 * K, 16, 128),
        (4, 4 * K, 64, 128),
        (8, 2 * K, 32, 256),
        (8, K, 8, 64),
    )
    prefill = ((8, 4 * K, 32, 128), (1, 32 * K, 32, 128), (1, 128 * K, 64, 128))
    for backward in (False, True):
        for grid, shapes in (("fla", fla), ("prefill", prefill)):
            for batch, seq, heads, head_dim in shapes:
                sizes = axes(batch=batch, seq=seq, heads=heads, head_dim=head_dim)
                yield Case("lightning_attention", grid, sizes, backward=backward)
    for batch in (1, 8, 64):
        sizes = axes(batch=batch, heads=64, head_dim=128)
        yield Case("lightning_decode", "decode", sizes)


CASES = (*_flash_cases(), *_decode_cases(), *_lightning_cases())
"""All of them, in the order in which they are run."""
