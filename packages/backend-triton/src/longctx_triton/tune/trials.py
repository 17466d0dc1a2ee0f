"""The calls that tiles are tuned on: the shapes of prefill and decode of large models."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longctx_triton import block_sparse, decode, dsa, flash, lightning, star, token_sparse
from longctx_triton.tune.session import Call, Trial

__all__ = ["TRIALS"]

K = 1024
FP8 = torch.float8_e4m3fn


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return random numbers."""
    if dtype == FP8:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(FP8)
    return torch.randn(shape, device=device, dtype=dtype)


def whole(device: torch.device, *values: int) -> Tensor:
    """Return int32 numbers."""
    return torch.tensor(values, device=device, dtype=torch.int32)


def heads_of(device: torch.device, tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q of 32 heads, k and v of 8."""
    q, k, v = (normal(device, 1, tokens, heads, dim) for heads in (32, 8, 8))
    return q, k, v


def portable(call: Call) -> Call:
    """Return the call without the kernels for Hopper alone."""

    def run() -> Sequence[Tensor]:
        before = os.environ.get("LONGCTX_TRITON_FLASH")
        os.environ["LONGCTX_TRITON_FLASH"] = "portable"
        try:
            return call()
        finally:
            if before is None:
                del os.environ["LONGCTX_TRITON_FLASH"]
            else:
                os.environ["LONGCTX_TRITON_FLASH"] = before

    return run


def attend(
    device: torch.device, dim: int, tokens: int, *, causal: bool = True, left: int | None = None,
    softcap: float = 0.0, sinks: bool = False, packed: bool = False, fp8: bool = False,
    backward: bool = False,
) -> Call:  # fmt: skip
    """Return flash attention of 32 heads, 16 of size 256, or its gradient."""
    heads = 16 if dim == 256 else 32
    q, k, v = (
        normal(device, 1, tokens, heads, dim, dtype=FP8 if fp8 else torch.bfloat16) for _ in "qkv"
    )
    ends = whole(device, 0, tokens // 3, tokens) if packed else None
    options: dict[str, Any] = {
        "causal": causal, "window_left": left, "window_right": None, "softcap": softcap,
        "sinks": torch.zeros(heads, device=device) if sinks else None, "scale": dim**-0.5,
        "cu_seqlens_q": ends, "cu_seqlens_k": ends,
    }  # fmt: skip
    factor = torch.ones(1, heads, device=device) if fp8 else None
    descales = dict.fromkeys(("q_descale", "k_descale", "v_descale"), factor)
    forward = partial(flash.flash_forward, q, k, v, **options, **descales)
    if not backward:
        return forward
    # calls are made where nothing is launched: a result like that of the forward pass
    out, dout = normal(device, *q.shape), normal(device, *q.shape)
    rows = torch.arange(1, tokens + 1, device=device, dtype=torch.float32)
    lse = (rows.log() + 0.5).expand(1, heads, tokens).contiguous()

    def gradient() -> Sequence[Tensor]:
        return flash.flash_backward(dout, None, q, k, v, out, lse, **options)[:3]

    return gradient


def read_cache(
    device: torch.device, dim: int, tokens: int, *, fp8: bool = False, page: int = 0,
    window: int | None = None, softcap: float = 0.0,
) -> Call:  # fmt: skip
    """Return decode attention of one new token, 32 heads and 8 KV heads."""
    shape = (tokens // page, page, 8, dim) if page else (1, tokens, 8, dim)
    k, v = (normal(device, *shape, dtype=FP8 if fp8 else torch.bfloat16) for _ in "kv")
    table = torch.randperm(tokens // page, device=device).int()[None] if page else None
    factor = torch.ones(8, device=device) if fp8 else None
    return partial(
        decode.decode_forward, normal(device, 1, 1, 32, dim), k, v,
        cache_seqlens=whole(device, tokens), page_table=table, window_left=window,
        softcap=softcap, sinks=None if window is None else torch.zeros(32, device=device),
        scale=dim**-0.5, k_scale=factor, v_scale=factor,
    )  # fmt: skip


def scan(
    device: torch.device, dim: int, batch: int, heads: int, tokens: int, *, packed: bool = False,
    backward: bool = False,
) -> Call:  # fmt: skip
    """Return lightning attention, or its gradient."""
    q, k, v = (normal(device, batch, tokens, heads, dim) for _ in "qkv")
    ends = whole(device, 0, tokens // 3, tokens) if packed else None
    state = torch.zeros(2 if packed else batch, heads, dim, dim, device=device)
    decay = -torch.linspace(0.01, 1.0, heads, device=device)
    options: dict[str, Any] = {"scale": dim**-0.5, "initial_state": state, "cu_seqlens": ends}
    if backward:
        return partial(lightning.lightning_backward, q, state, q, k, v, decay, **options)
    return partial(lightning.lightning_forward, q, k, v, decay, **options)


def walk_blocks(device: torch.device, dim: int, tokens: int) -> Call:
    """Return block-sparse attention: of each row of blocks of 128 its own and an eighth."""
    blocks = tokens // 128
    kept = max(1, blocks // 8)
    past = torch.ones(blocks, blocks, device=device).tril(-1) * torch.rand(
        32, blocks, blocks, device=device
    )
    chosen = past.topk(kept, dim=-1).indices
    chosen[..., 0] = torch.arange(blocks, device=device)
    rows = torch.arange(blocks, device=device)[:, None]
    # a row above the eighth has fewer blocks before it; those behind it are dropped
    order = chosen.sort(-1).values
    first = torch.cat(
        [torch.ones_like(order[..., :1], dtype=torch.bool), order.diff(dim=-1) > 0], -1
    )
    fits = (order <= rows) & first
    counts = fits.sum(-1, dtype=torch.int32)
    indices = order.masked_fill(~fits, blocks).sort(-1).values.clamp(max=blocks - 1).int()
    return partial(
        block_sparse.block_sparse_forward, *heads_of(device, tokens, dim), counts[None],
        indices[None], block_q=128, block_k=128, causal=True, scale=dim**-0.5,
    )  # fmt: skip


def slide(device: torch.device, dim: int, tokens: int, *, by_head: bool = False) -> Call:
    """Return attention under a window plan: 128 first tokens and 3968 recent ones."""
    return partial(
        block_sparse.window_sparse_forward, *heads_of(device, tokens, dim),
        torch.full((32,), 3967, device=device, dtype=torch.int32) if by_head else None,
        window=3967, sink_tokens=128, last_queries=0, scale=dim**-0.5,
    )  # fmt: skip


def read_context(device: torch.device, dim: int, tokens: int) -> Call:
    """Return star attention's first phase in eight blocks."""
    return partial(
        star.star_context_forward, *heads_of(device, tokens, dim), block_size=tokens // 8,
        anchor_size=tokens // 8, scale=dim**-0.5,
    )  # fmt: skip


def gather_tokens(device: torch.device, dim: int, tokens: int) -> Call:
    """Return attention among a quarter of the tokens, chosen by each head."""
    kept = tokens // 4
    chosen = torch.rand(32, tokens, device=device).topk(kept, dim=-1).indices.sort(-1).values
    return partial(
        token_sparse.token_sparse_forward, *heads_of(device, tokens, dim), chosen[None].int(),
        torch.full((1, 32), kept, device=device, dtype=torch.int32), scale=dim**-0.5,
    )  # fmt: skip


def read_lists(
    device: torch.device, tokens: int, keys: int, *, latent: bool = True, sinks: bool = False
) -> Call:
    """Return attention over lists of 2048 keys: absorbed MLA of 128 heads, or 32 heads on 8."""
    heads, kv_heads, dim = (128, 1, 576) if latent else (32, 8, 128)
    k = normal(device, 1, keys, kv_heads, dim)
    v = k[..., :512] if latent else normal(device, 1, keys, kv_heads, dim)
    lists = torch.randint(keys, (1, tokens, kv_heads, 2048), device=device).sort(-1).values
    return partial(
        dsa.topk_attention_forward, normal(device, 1, tokens, heads, dim), k, v, lists.int(),
        page_size=1, scale=dim**-0.5, sinks=torch.zeros(heads, device=device) if sinks else None,
    )  # fmt: skip


def score_keys(device: torch.device, tokens: int, keys: int, *, fp8: bool = True) -> Call:
    """Return the indexer's scores of 64 heads."""
    dtype = FP8 if fp8 else torch.bfloat16
    q, k = (
        normal(device, 1, tokens, 64, 128, dtype=dtype),
        normal(device, 1, keys, 128, dtype=dtype),
    )
    factors = torch.ones(1, keys, device=device) if fp8 else None
    weights = torch.randn(1, tokens, 64, device=device)

    def scores() -> Sequence[Tensor]:
        return (
            dsa.index_scores_forward(
                q, k, weights, k_scale=factors, causal=True, key_start=None, key_end=None
            ),
        )

    return scores


def _flash_trials(dim: int) -> list[Trial]:
    def plain(device: torch.device) -> list[Call]:
        return [
            portable(attend(device, dim, 8 * K)),
            portable(attend(device, dim, 1000, packed=True, sinks=True)),
            portable(attend(device, dim, 1000, causal=False)),
        ]

    def masked(device: torch.device) -> list[Call]:
        everything: dict[str, Any] = {"left": 500, "softcap": 30.0, "sinks": True, "packed": True}
        return [
            portable(attend(device, dim, 16 * K, left=4096)),
            portable(attend(device, dim, 1000, **everything)),
            portable(attend(device, dim, 1000, fp8=True)),
        ]

    def gradient(device: torch.device) -> list[Call]:
        return [
            portable(attend(device, dim, 8 * K, backward=True)),
            portable(attend(device, dim, 1000, packed=True, backward=True)),
            portable(attend(device, dim, 1000, causal=False, backward=True)),
        ]

    return [
        Trial("flash_forward", f"D{dim} causal 8K", plain),
        Trial("flash_forward", f"D{dim} window 4096 of 16K", masked),
        Trial("flash_dq", f"D{dim} causal 8K", gradient),
        Trial("flash_dkdv", f"D{dim} causal 8K", gradient),
    ]


def _decode_trial(dim: int, **kind: Any) -> Trial:
    def calls(device: torch.device) -> list[Call]:
        return [
            # so long that what is faster holds for a batch and for 1M, too
            read_cache(device, dim, 512 * K, **kind),
            read_cache(device, dim, 1024, window=200, softcap=30.0, **kind),
        ]

    words = [f"D{dim} B1 512K", "fp8" if kind.get("fp8") else "bf16"]
    return Trial(
        "decode", " ".join([*words, "pages of 16"][: 3 if kind.get("page") else 2]), calls
    )


def _alone(kernel: str, case: str, *calls: Callable[[torch.device], Call]) -> Trial:
    return Trial(kernel, case, lambda device: [call(device) for call in calls])


def _bind(call: Callable[..., Call], *args: Any, **kwargs: Any) -> Callable[[torch.device], Call]:
    return lambda device: call(device, *args, **kwargs)


def _portably(call: Callable[[torch.device], Call]) -> Callable[[torch.device], Call]:
    return lambda device: portable(call(device))


def _all_trials() -> list[Trial]:
    found = [trial for dim in (128, 64) for trial in _flash_trials(dim)]
    found += [_decode_trial(dim, fp8=fp8) for dim in (128, 64) for fp8 in (False, True)]
    found += [_decode_trial(128, fp8=fp8, page=16) for fp8 in (False, True)]
    for dim in (128, 64):
        further = (
            _bind(scan, dim, 1, 64, 1000, packed=True),
            _bind(scan, dim, 1, 64, 1000, backward=True),
        )
        found.append(
            _alone("lightning", f"D{dim} B1 H64 32K", _bind(scan, dim, 1, 64, 32 * K), *further)
        )
    # several programs for every multiprocessor
    many = (_bind(scan, 128, 8, 32, 4 * K), _bind(scan, 128, 8, 32, 1000, backward=True))
    found.append(_alone("lightning", "D128 B8 H32 4K", *many))
    for dim in (128, 64):
        blocks, context = _bind(walk_blocks, dim, 32 * K), _bind(read_context, dim, 32 * K)
        window, by_head = _bind(slide, dim, 32 * K), _bind(slide, dim, 1000, by_head=True)
        tokens = _bind(gather_tokens, dim, 32 * K)
        found += [
            _alone("block_list", f"D{dim} 32K density .25", _portably(blocks)),
            _alone("key_range", f"D{dim} window of 32K", _portably(window), _portably(by_head)),
            _alone("key_range_star", f"D{dim} 32K", _portably(context)),
            _alone("token_attention", f"D{dim} a quarter of 32K", _portably(tokens)),
        ]
    found += [
        _alone(
            "topk_attention", "latent 2048 of 32K", _bind(read_lists, K, 32 * K),
            _bind(read_lists, K, 32 * K, sinks=True),
        ),
        _alone("topk_attention", "D128 2048 of 32K", _bind(read_lists, K, 32 * K, latent=False)),
        _alone(
            "index_scores", "1K x 64K fp8", _bind(score_keys, K, 64 * K),
            _bind(score_keys, K, 4 * K, fp8=False),
        ),
        Trial("flash_forward", "D256 causal 8K", _flash_trials(256)[0].calls),
    ]  # fmt: skip
    for dim in (128, 64):
        full = _bind(attend, dim, 1000, causal=False)
        sinks = _bind(attend, dim, 1000, sinks=True)
        causal = _bind(attend, dim, 16 * K)
        found.append(_alone("flash_hopper", f"D{dim} causal 16K", causal, full, sinks))
        window, by_head = _bind(slide, dim, 32 * K), _bind(slide, dim, 1000, by_head=True)
        others = (by_head, _bind(walk_blocks, dim, 1024), _bind(read_context, dim, 2048))
        found.append(_alone("key_walk", f"D{dim} window of 32K", window, *others))
        tokens = _bind(gather_tokens, dim, 32 * K)
        found.append(_alone("token_walk", f"D{dim} a quarter of 32K", tokens))
    return found


TRIALS: Sequence[Trial] = tuple(_all_trials())
"""The kernels that matter most come first, the one whose variants are bravest last."""
