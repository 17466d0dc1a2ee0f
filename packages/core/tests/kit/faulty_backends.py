"""Backends with planted faults, each a mistake that real kernels have made.

A plugin module for ``LONGCTX_PLUGINS``. Every backend is the built-in one, restricted to one op,
with one primitive replaced; ``sound`` replaces nothing and must pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx import PROTOCOL_VERSION, BackendBase, BackendInfo, hookimpl
from longctx.torch_backend import decode, dsa, flash, lightning
from longctx.torch_backend.support import SUPPORT


def top_left_causal(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **options: Any) -> Any:
    """Align the causal diagonal with the first key instead of the last."""
    if causal and q.shape[1] < k.shape[1] and options["cu_seqlens_q"] is None:
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    return flash.flash_forward(q, k, v, causal=causal, **options)


def _by_blocks(carry: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Run lightning in blocks of 64 and change the state at each border with `carry`."""

    def lightning_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is not None:
            return lightning.lightning_forward(
                q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
            )
        state, outs = initial_state, []
        for start in range(0, q.shape[1], 64):
            block = slice(start, start + 64)
            out, state = lightning.lightning_forward(
                q[:, block],
                k[:, block],
                v[:, block],
                log_decay,
                scale=scale,
                initial_state=state,
                cu_seqlens=None,
            )
            outs.append(out)
            if start + 64 < q.shape[1]:
                state = carry(state, log_decay)
        return torch.cat(outs, 1), state

    return lightning_forward


def _decayed_once_more(state: Tensor, log_decay: Tensor) -> Tensor:
    return state * log_decay.to(state).exp().view(-1, 1, 1)


def _rounded_to_bf16(state: Tensor, log_decay: Tensor) -> Tensor:
    return state.bfloat16().to(state.dtype)


def interleaved_scales(
    q: Tensor, k: Tensor, weights: Tensor, *, k_scale: Tensor | None, **options: Any
) -> Tensor:
    """Read the scales as if those of the batch entries alternated token by token."""
    if k_scale is not None:
        k_scale = k_scale.flatten().view(k_scale.shape[1], k_scale.shape[0]).t()
    return dsa.index_scores_forward(q, k, weights, k_scale=k_scale, **options)


def interleaved_cache_scales(
    q: Tensor, k: Tensor, v: Tensor, *, k_scale: Tensor | None, **options: Any
) -> Any:
    """Read the scales ``[batch, kv_heads]`` of an fp8 cache as ``[kv_heads, batch]``."""
    if k_scale is not None:
        k_scale = k_scale.flatten().view(k_scale.shape[1], k_scale.shape[0]).t().contiguous()
    return decode.decode_forward(q, k, v, k_scale=k_scale, **options)


def unrescaled_merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Average the parts by ``exp(lse)`` without a shift, which overflows or vanishes."""
    weights = lses.exp()
    total = weights.sum(0)
    shares = (weights / total.clamp(min=1e-30)).transpose(-1, -2).unsqueeze(-1)
    return (outs * shares).sum(0).to(outs.dtype), total.log()


def one_slot_too_many(
    q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, page_table: Any, **options: Any
) -> Any:
    """Read one slot of a contiguous cache behind what was written."""
    if page_table is None:
        cache_seqlens = (cache_seqlens + 1).clamp(max=k.shape[1])
    return decode.decode_forward(
        q, k, v, cache_seqlens=cache_seqlens, page_table=page_table, **options
    )


def offsets_in_32_bits(
    q: Tensor, k: Tensor, v: Tensor, *, page_table: Tensor | None, **options: Any
) -> Any:
    """Compute the offset of a page in 32 bits: it wraps around beyond 2**31 elements."""
    if page_table is not None:
        stride = max(k.stride(0), 1)
        wrapped = (page_table.long() * stride).to(torch.int32).long()
        page_table = (wrapped // stride).clamp(min=0).to(torch.int32)
    return decode.decode_forward(q, k, v, page_table=page_table, **options)


def dropping_topk(q: Tensor, k: Tensor, *args: Any, causal: bool, **options: Any) -> Tensor:
    """Keep a bounded number of candidates in the bin where the threshold falls."""
    k_scale, weights, top_k = args
    chosen = dsa.index_topk_forward(q, k, k_scale, weights, top_k, causal=causal, **options)
    bounds = {name: options[name] for name in ("key_start", "key_end")}
    scores = dsa.index_scores_forward(q, k, weights, k_scale=k_scale, causal=causal, **bounds)
    # the upper 12 bits of an ordered key: sign, exponent and 3 bits of the mantissa
    bins = scores.float().view(torch.int32) >> 20
    threshold = bins.gather(-1, chosen.clamp(min=0).long()).masked_fill(chosen < 0, 2**30)
    threshold = threshold.amin(-1, keepdim=True)
    in_bin = bins.gather(-1, chosen.clamp(min=0).long()) == threshold
    dropped = (in_bin.cumsum(-1) > 32) & in_bin & (chosen >= 0)
    chosen = chosen.masked_fill(dropped, torch.iinfo(torch.int32).max).sort(-1).values
    return chosen.masked_fill(chosen == torch.iinfo(torch.int32).max, -1)


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes
    ----------
    op, primitive : str
        What it is planted in.
    function : callable
        The faulty primitive.
    """

    op: str
    primitive: str
    function: Callable[..., Any]


FAULTS = {
    "wrong-causal-alignment": Fault("flash_attention", "flash_forward", top_left_causal),
    "off-by-one-decay": Fault(
        "lightning_attention", "lightning_forward", _by_blocks(_decayed_once_more)
    ),
    "bf16-carried-state": Fault(
        "lightning_attention", "lightning_forward", _by_blocks(_rounded_to_bf16)
    ),
    "interleaved-scales": Fault("index_scores", "index_scores_forward", interleaved_scales),
    "interleaved-cache-scales": Fault(
        "decode_attention", "decode_forward", interleaved_cache_scales
    ),
    "unrescaled-merge": Fault("merge_attention", "merge_forward", unrescaled_merge),
    "unwritten-slot": Fault("decode_attention", "decode_forward", one_slot_too_many),
    "int32-offsets": Fault("decode_attention", "decode_forward", offsets_in_32_bits),
    "dropping-topk": Fault("index_topk", "index_topk_forward", dropping_topk),
}

SOUND_OPS = sorted({fault.op for fault in FAULTS.values()})


def _load(op: str, **replaced: Callable[..., Any]) -> Callable[[], BackendBase]:
    def load() -> BackendBase:
        primitives = {
            name: getattr(module, name)
            for module in (flash, decode, lightning, dsa)
            for name in module.__all__
        }
        return BackendBase({op: SUPPORT[op]}, primitives | replaced)

    return load


@hookimpl
def longctx_backends() -> list[BackendInfo]:
    """Offer a backend a fault, under its name, and ``sound-OP``, the same without a fault."""
    loaders = {
        name: _load(fault.op, **{fault.primitive: fault.function})
        for name, fault in FAULTS.items()
    }
    for op in SOUND_OPS:
        loaders[f"sound-{op}"] = _load(op)
    return [BackendInfo(name, "1.0", PROTOCOL_VERSION, load) for name, load in loaders.items()]
