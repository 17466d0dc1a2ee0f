"""Calls of primitives on meta tensors, for the sake of the kernels that they launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx_triton import block_sparse, decode, dsa, flash, lightning, star, token_sparse
from longctx_triton.launch import decode_plan, flash_hopper, mla_hopper

__all__ = ["CASES"]

LENGTH = 5001
"""Of most sequences: odd, as most are, and enough for every split."""


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    """Return `fake` int32."""
    return fake(*shape, dtype=torch.int32)


def floats(*shape: int) -> Tensor:
    """Return `fake` fp32."""
    return fake(*shape, dtype=torch.float32)


def heads_of(dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v: two sequences, 32 query heads, 8 KV heads."""
    shapes = ((2, LENGTH, heads, dim) for heads in (32, 8, 8))
    q, k, v = (fake(*shape, dtype=dtype) for shape in shapes)
    return q, k, v


def flash_case(
    dim: int, *, causal: bool = True, left: int | None = None, softcap: float = 0.0,
    sinks: bool = False, packed: bool = False, fp8: bool = False, backward: bool = False,
) -> None:  # fmt: skip
    """Attend, or with ``backward`` sum the gradients."""
    q, k, v = heads_of(dim, torch.float8_e4m3fn if fp8 else torch.bfloat16)
    if packed:
        q, k, v = q[:1], k[:1], v[:1]
    ends = ints(4) if packed else None
    options: dict[str, Any] = {
        "causal": causal, "window_left": left, "window_right": None, "softcap": softcap,
        "sinks": floats(32) if sinks else None, "scale": 0.1,
        "cu_seqlens_q": ends, "cu_seqlens_k": ends,
    }  # fmt: skip
    if backward:
        lse = floats(q.shape[0], 32, LENGTH)
        flash.flash_backward(q, None, q, k, v, q, lse, **options)
        return
    descales = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
    if fp8:
        descales = {name: floats(2, 8) for name in descales}
    flash.flash_forward(q, k, v, **options, **descales)


def deterministic_case(dim: int, **options: Any) -> None:
    """Sum the gradients without atomics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        flash_case(dim, **options, backward=True)


def ping_pong_case(dim: int) -> None:
    """Attend with the consumers of the Hopper kernel taking turns."""
    with pytest.MonkeyPatch.context() as patch:
        tiles = flash_hopper.hopper_tiles(dim, False)._replace(ping_pong=True)
        patch.setattr(flash_hopper, "hopper_tiles", lambda _dim, _fp8: tiles)
        flash_hopper._plan.cache_clear()
        flash_case(dim)
    flash_hopper._plan.cache_clear()


def decode_case(
    dim: int, *, batch: int = 2, tokens: int = 1, paged: bool = True, fp8: bool = False,
    window: int | None = None, softcap: float = 0.0, pages: int = 128,
) -> None:  # fmt: skip
    """Attend over a cache, in splits unless the batch fills the GPU."""
    cache = (512, 64, 8, dim) if paged else (batch, LENGTH, 8, dim)
    k, v = (fake(*cache, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16) for _ in "kv")
    decode.decode_forward(
        fake(batch, tokens, 32, dim), k, v, cache_seqlens=ints(batch),
        page_table=ints(batch, pages) if paged else None, window_left=window, softcap=softcap,
        sinks=None if window is None else floats(32), scale=0.1,
        k_scale=floats(8) if fp8 else None, v_scale=floats(8) if fp8 else None,
    )  # fmt: skip


def apart_decode_case(dim: int, **options: Any) -> None:
    """Decode and merge in two kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_plan, "MERGED_BYTES", 0)
        decode_plan.decode_plan.cache_clear()
        decode_case(dim, **options)
    decode_plan.decode_plan.cache_clear()


def lightning_case(
    dim: int, *, batch: int = 1, heads: int = 16, tokens: int = 16384, packed: bool = False,
    backward: bool = False, padded: bool = False,
) -> None:  # fmt: skip
    """Scan; one sequence of 16 heads is cut, four of 64 are not.

    With ``padded``, strides are no multiples of 16.
    """
    q, k, v = (fake(batch, tokens, heads, dim + 8 * padded)[..., :dim] for _ in "qkv")
    state = floats(3 if packed else batch, heads, dim, dim)
    options: dict[str, Any] = {
        "scale": 0.1, "initial_state": state, "cu_seqlens": ints(4) if packed else None
    }  # fmt: skip
    if backward:
        lightning.lightning_backward(q, state, q, k, v, floats(heads), **options)
    else:
        lightning.lightning_forward(q, k, v, floats(heads), **options)


def index_inputs(fp8: bool, tokens: int = LENGTH) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q, k, weights and the scales of k: 64 index heads of 128 channels."""
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    scales = floats(1, LENGTH) if fp8 else None
    keys = fake(1, LENGTH, 128, dtype=dtype)
    return fake(1, tokens, 64, 128, dtype=dtype), keys, floats(1, tokens, 64), scales


def index_scores_case(*, fp8: bool = False, tokens: int = LENGTH, ranged: bool = False) -> None:
    """Score keys."""
    q, k, weights, scales = index_inputs(fp8, tokens)
    start, end = (ints(1, tokens) if ranged else None for _ in "se")
    dsa.index_scores_forward(
        q, k, weights, k_scale=scales, causal=not ranged, key_start=start, key_end=end
    )


def index_backward_case() -> None:
    """Sum the gradients of the indexer."""
    q, k, weights, _ = index_inputs(False)
    dscores = floats(1, LENGTH, LENGTH)
    dsa.index_scores_backward(
        dscores, q, k, weights, causal=True, key_start=None, key_end=None
    )  # fmt: skip


def index_topk_case(top_k: int, length: int, tokens: int = 2) -> None:
    """Choose keys: of parts of few rows, of rows in turn, or row by row where top_k is large."""
    q, k = fake(1, tokens, 64, 128), fake(1, length, 128)
    dsa.index_topk_forward(
        q, k, None, floats(1, tokens, 64), top_k,
        causal=True, key_start=None, key_end=None, deterministic=True,
    )  # fmt: skip


def topk_attention_case(
    dim: int, value_dim: int, *, tokens: int = 512, kv_heads: int = 1, pages: int = 1,
    latent: bool = False,
) -> None:  # fmt: skip
    """Attend over lists; the latent's values are the first part of its keys."""
    keys = fake(1, LENGTH, kv_heads, dim)
    values = keys[..., :value_dim] if latent else fake(1, LENGTH, kv_heads, value_dim)
    dsa.topk_attention_forward(
        fake(1, tokens, 64 if latent else 32, dim), keys, values,
        ints(1, tokens, kv_heads, 2048 // pages),
        page_size=pages, scale=0.1, sinks=floats(64 if latent else 32),
    )  # fmt: skip


def latent_hopper_case(*, tokens: int = 512, least: int = 1) -> None:
    """Attend over lists of latent keys with the Hopper kernel, or without from ``least`` heads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla_hopper, "LEAST_HEADS", least)
        topk_attention_case(576, 512, latent=True, tokens=tokens)


def quantize_case(scale_format: str) -> None:
    """Quantise rows of 128 channels."""
    dsa.quantize_forward(fake(2, LENGTH, 64, 128), scale_format=scale_format)


def block_sparse_case(dim: int, *, block: int = 128, sets: int = 32) -> None:
    """Attend over blocks."""
    blocks = -(-LENGTH // block)
    counts, indices = ints(2, sets, blocks), ints(2, sets, blocks, 16)
    block_sparse.block_sparse_forward(
        *heads_of(dim), counts, indices, block_q=block, block_k=block, causal=True, scale=0.1
    )


def window_sparse_case(dim: int, *, by_head: bool = False) -> None:
    """Attend in windows."""
    block_sparse.window_sparse_forward(
        *heads_of(dim), ints(32) if by_head else None,
        window=1024, sink_tokens=64, last_queries=128, scale=0.1,
    )  # fmt: skip


def stripe_sparse_case(dim: int) -> None:
    """Attend over columns and diagonals."""
    block_sparse.stripe_sparse_forward(
        *heads_of(dim), ints(2, 32, 1000), ints(2, 32), ints(2, 32, 800), ints(2, 32), scale=0.1
    )


def star_context_case(dim: int, *, block: int = 1024) -> None:
    """Phase 1."""
    star.star_context_forward(*heads_of(dim), block_size=block, anchor_size=block, scale=0.1)


def star_query_case(dim: int, *, tokens: int) -> None:
    """Phase 2 over two shards: chained for many tokens, in parts for few."""
    keys, values = ([fake(1, LENGTH, 8, dim) for _ in range(2)] for _ in "kv")
    star.star_query_forward(fake(1, tokens, 32, dim), keys, values, query_shard=1, scale=0.1)


def token_scores_case(dim: int) -> None:
    """Score tokens."""
    token_sparse.token_scores_forward(
        fake(2, 64, 32, dim), fake(2, LENGTH, 8, dim), pool=7, scale=0.1
    )


def select_tokens_case() -> None:
    """Choose tokens."""
    token_sparse.select_tokens_forward(
        floats(2, 32, LENGTH), drop_mass=0.05, min_tokens=64, recent=64
    )


def token_sparse_case(dim: int, *, portable: bool = False) -> None:
    """Attend among chosen tokens, with the Hopper kernel or without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGCTX_TRITON_FLASH", "portable" if portable else "")
        sets = ints(2, 32, LENGTH), ints(2, 32)
        token_sparse.token_sparse_forward(*heads_of(dim), *sets, scale=0.1)


def merge_case(dim: int, dtype: torch.dtype, *, tokens: int = 7) -> None:
    """Merge four parts."""
    decode.merge_forward(fake(4, 2, tokens, 32, dim, dtype=dtype), floats(4, 2, 32, tokens))


def lightning_decode_case(dim: int) -> None:
    """Decode one token."""
    q, k, v = (fake(8, 1, 64, dim) for _ in "qkv")
    lightning.lightning_decode_forward(q, k, v, floats(8, 64, dim, dim), floats(64), scale=0.1)


EVERYTHING: dict[str, Any] = {"left": 1024, "softcap": 30.0, "sinks": True, "packed": True}
CASES: dict[str, Callable[[], None]] = {
    "flash 128 ping-pong": partial(ping_pong_case, 128),
    "flash 128 fp8 window": partial(flash_case, 128, fp8=True, left=1024),
    "flash 256": partial(flash_case, 256),
    "flash backward 256": partial(flash_case, 256, backward=True),
    "decode 256": partial(decode_case, 256),
    "stripe sparse 96": partial(stripe_sparse_case, 96),
    "index scores": index_scores_case,
    "index scores fp8": partial(index_scores_case, fp8=True),
    "index scores fp8 one token": partial(index_scores_case, fp8=True, tokens=1),
    "index scores ranged": partial(index_scores_case, ranged=True),
    "index backward": index_backward_case,
    "index topk": partial(index_topk_case, 2048, 100_001),
    "index topk large": partial(index_topk_case, 8192, 100_001),
    "index topk rows": partial(index_topk_case, 2048, 100_001, 500),
    "topk attention latent": partial(latent_hopper_case, least=128),
    "topk attention latent decode": partial(latent_hopper_case, least=128, tokens=1),
    "topk attention latent hopper": latent_hopper_case,
    "topk attention latent hopper decode": partial(latent_hopper_case, tokens=1),
    "topk attention wide": partial(topk_attention_case, 576, 512),
    "quantize": partial(quantize_case, "fp32"),
    "quantize ue8m0": partial(quantize_case, "ue8m0"),
    "select tokens": select_tokens_case,
}
"""Calls of primitives; a number in a name is the head size."""
for _d in (64, 128):
    CASES |= {
        f"flash {_d} causal": partial(flash_case, _d),
        f"flash {_d} full": partial(flash_case, _d, causal=False),
        f"flash {_d} sinks": partial(flash_case, _d, sinks=True),
        f"flash {_d} packed": partial(flash_case, _d, packed=True),
        f"flash {_d} window": partial(flash_case, _d, left=1024),
        f"flash {_d} all": partial(flash_case, _d, **EVERYTHING),
        f"flash {_d} fp8": partial(flash_case, _d, fp8=True),
        f"flash backward {_d} causal": partial(deterministic_case, _d),
        f"flash backward {_d} full": partial(deterministic_case, _d, causal=False),
        f"flash backward {_d} packed": partial(flash_case, _d, packed=True, backward=True),
        f"flash backward {_d} all": partial(flash_case, _d, backward=True, **EVERYTHING),
        f"flash backward hopper {_d} causal": partial(flash_case, _d, backward=True),
        f"flash backward hopper {_d} full": partial(flash_case, _d, causal=False, backward=True),
        f"decode {_d} paged": partial(decode_case, _d),
        f"decode {_d} full batch": partial(decode_case, _d, batch=64),
        f"decode {_d} dense": partial(decode_case, _d, paged=False),
        f"decode {_d} fp8": partial(decode_case, _d, fp8=True),
        f"decode {_d} tokens": partial(decode_case, _d, tokens=16),
        f"decode {_d} window": partial(decode_case, _d, window=1024, softcap=30.0),
        f"decode {_d} dense fp8": partial(decode_case, _d, fp8=True, paged=False),
        f"decode {_d} apart": partial(apart_decode_case, _d, paged=False),
        f"decode {_d} apart tokens": partial(apart_decode_case, _d, tokens=16),
        f"merge {_d}": partial(merge_case, _d, torch.bfloat16),
        f"lightning {_d} cut": partial(lightning_case, _d),
        f"lightning {_d} whole": partial(lightning_case, _d, batch=4, heads=66),
        f"lightning {_d} packed": partial(lightning_case, _d, packed=True),
        f"lightning {_d} padded": partial(lightning_case, _d, batch=4, heads=66, padded=True),
        f"lightning backward {_d}": partial(lightning_case, _d, backward=True),
        f"lightning decode {_d}": partial(lightning_decode_case, _d),
        f"block sparse {_d}": partial(block_sparse_case, _d),
        f"block sparse {_d} of 64": partial(block_sparse_case, _d, block=64),
        f"block sparse {_d} of 64 by pair": partial(block_sparse_case, _d, block=64, sets=8),
        f"window sparse {_d}": partial(window_sparse_case, _d),
        f"window sparse {_d} by head": partial(window_sparse_case, _d, by_head=True),
        f"stripe sparse {_d}": partial(stripe_sparse_case, _d),
        f"star context {_d}": partial(star_context_case, _d),
        f"star context {_d} of 1000": partial(star_context_case, _d, block=1000),
        f"star query {_d} chained": partial(star_query_case, _d, tokens=1000),
        f"star query {_d} parts": partial(star_query_case, _d, tokens=1),
        f"token scores {_d}": partial(token_scores_case, _d),
        f"token sparse {_d}": partial(token_sparse_case, _d),
        f"token sparse {_d} portable": partial(token_sparse_case, _d, portable=True),
        f"topk attention {_d}": partial(topk_attention_case, _d, _d, kv_heads=8),
        f"topk attention {_d} pages": partial(topk_attention_case, _d, _d, kv_heads=8, pages=64),
    }
