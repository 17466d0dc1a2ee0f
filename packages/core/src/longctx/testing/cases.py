"""Ready-made cases, at least one an op: inputs, the public call, and the oracle's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.reference import block_sparse, decode, dsa, flash, lightning, star, token_sparse
from longctx.testing.low_precision import chunked_lightning

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A parity case.

    Attributes
    ----------
    op : str
        Public op name, as in the support tables.
    name : str
        What the case stresses.
    inputs : callable
        Makes fp32 CPU tensors from a generator.
    call : callable
        Runs the public function on inputs of the tested device and dtype; returns float tensors.
    oracle : callable
        The same from the oracle, in the precision of its inputs.
    features : tuple of str
        Optional features that the call uses.
    keep_fp32 : frozenset of str
        Inputs that are not cast to the tested dtype.
    low : callable, optional
        The same as a sound kernel of the tested precision computes it, where the oracle in that
        precision is more exact than any kernel.
    fp32_only : bool
        Whether the op takes nothing else, so that the case exists in fp32 alone.
    capturable : bool
        Whether the call itself, its plan included, is free of copies from the host.
    """

    op: str
    name: str
    inputs: Callable[[torch.Generator], Tensors]
    call: Callable[..., tuple[Tensor, ...]]
    oracle: Callable[..., tuple[Tensor, ...]]
    features: tuple[str, ...] = ()
    keep_fp32: frozenset[str] = field(default_factory=frozenset)
    low: Callable[..., tuple[Tensor, ...]] | None = None
    fp32_only: bool = False
    capturable: bool = True

    @property
    def id(self) -> str:
        """Name for pytest."""
        return f"{self.op}-{self.name}"

    def references(
        self, made: Tensors, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the exact results, and those that the tested precision can be expected to give.

        Both see the values after rounding to the tested dtype.
        """
        rounded = cast(self, made, "cpu", dtype)
        exact = self.oracle(**cast(self, rounded, "cpu", torch.float64))
        half = dtype.itemsize == 2
        return exact, (self.low if self.low and half else self.oracle)(**rounded)


def qkv(q_len: int, k_len: int, q_heads: int = 4, kv_heads: int = 2, dim: int = 64) -> Any:
    """Return a maker of random q, k, v."""

    def make(generator: torch.Generator) -> Tensors:
        shapes = {"q": (q_len, q_heads), "k": (k_len, kv_heads), "v": (k_len, kv_heads)}
        return {n: torch.randn(2, *s, dim, generator=generator) for n, s in shapes.items()}

    return make


def flash_case(
    name: str, q_len: int, k_len: int, features: tuple[str, ...], **options: Any
) -> Case:
    """Return a case of flash_attention with lse."""
    return Case(
        "flash_attention",
        name,
        qkv(q_len, k_len),
        lambda backend, **t: longctx.flash_attention_with_lse(**t, **options, backend=backend),
        lambda **t: flash.flash_attention(**t, **options),
        features,
    )


def decode_inputs(generator: torch.Generator) -> Tensors:
    """Return queries, caches longer than what they hold, and ragged lengths."""
    made = qkv(3, 160)(generator)
    return {"q": made["q"], "k": made["k"], "v": made["v"], "seqlens": torch.tensor([160, 77])}


def lightning_inputs(generator: torch.Generator) -> Tensors:
    """Return head-equal q, k, v, decays from none to fast, and a state."""
    made = qkv(131, 131, 4, 4)(generator)
    decay = torch.tensor([0.0, -5e-5, -0.05, -0.9])
    state = torch.randn(2, 4, 64, 64, generator=generator)
    return {**made, "log_decay": decay, "initial_state": state}


def indexer_inputs(generator: torch.Generator) -> Tensors:
    """Return indexer queries, keys and weights of both signs."""
    return {
        "q": torch.randn(2, 70, 4, 64, generator=generator),
        "k": torch.randn(2, 150, 64, generator=generator),
        "weights": torch.randn(2, 70, 4, generator=generator),
    }


def topk_inputs(generator: torch.Generator) -> Tensors:
    """Return q, k, v and an index list with holes."""
    indices = torch.randint(-1, 150, (2, 70, 1, 40), generator=generator).sort(-1).values
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[..., 1:] = indices[..., 1:] == indices[..., :-1]
    return {**qkv(70, 150)(generator), "indices": indices.masked_fill(repeated, -1)}


def topk_plan(indices: Tensor) -> longctx.TopKPlan:
    """Return the plan of an index list."""
    return longctx.TopKPlan(indices.to(torch.int32))


def block_plan(device: torch.device) -> longctx.BlockPlan:
    """Return a plan of 32 x 16 blocks a KV head with uneven counts."""
    counts = torch.tensor([[[2, 3, 5], [1, 4, 0]]] * 2, dtype=torch.int32, device=device)
    indices = torch.arange(6, dtype=torch.int32, device=device).expand(2, 2, 3, 6).contiguous()
    return longctx.BlockPlan(counts, indices, 32, 16, "kv")


def token_plan(device: torch.device) -> longctx.TokenSetPlan:
    """Return a plan of every third token, another residue a query head."""
    sets = torch.stack([torch.arange(h % 3, 120, 3)[:39] for h in range(4)])
    indices = sets.expand(2, 4, 39).to(torch.int32).contiguous().to(device)
    return longctx.TokenSetPlan(
        indices, torch.full((2, 4), 39, dtype=torch.int32, device=device), "query"
    )


def chosen_scores(indices: Tensor, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Return the sorted oracle scores of the chosen keys, which ties leave unchanged."""
    scores = dsa.index_scores(q, k, weights)
    return scores.gather(-1, indices[:, :, 0].long().to(scores.device)).sort(-1).values


def stepped(
    decode_step: Callable[..., Tensor], state: Tensor, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """Return a decode step's output and the state that it left behind."""
    state = state.clone()
    return decode_step(**inputs, state=state), state


def step_oracle(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the oracle's output and state; the state's precision is the step's."""
    q, k, v = (t[:, 0].to(state.dtype) for t in (q, k, v))
    out, state = lightning.lightning_decode(q, k, v, state, log_decay)
    return out.unsqueeze(1), state


def state_precision(initial_state: Tensor, **inputs: Tensor) -> dict[str, Any]:
    """Return lightning inputs in the precision of the carried state, which is fp32 or better."""
    wide = {name: tensor.to(initial_state.dtype) for name, tensor in inputs.items()}
    return {**wide, "initial_state": initial_state}


def dequantized(quantized: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the values that an fp8 row stands for, and its scales."""
    values, scale = quantized
    return values.float() * scale.float().unsqueeze(-1), scale


CASES = [
    flash_case("full", 63, 129, ()),
    flash_case("causal", 65, 129, (), causal=True),
    flash_case("window", 129, 129, ("window",), causal=True, window=(16, 0)),
    flash_case("softcap", 65, 65, ("softcap",), causal=True, softcap=5.0),
    flash_case("empty-rows", 129, 65, (), causal=True),
    Case(
        "decode_attention",
        "ragged",
        decode_inputs,
        lambda backend, q, k, v, seqlens: longctx.decode_attention_with_lse(
            q, k, v, cache_seqlens=seqlens.to(torch.int32), backend=backend
        ),
        lambda q, k, v, seqlens: decode.decode_attention(q, k, v, cache_seqlens=seqlens),
        ("multi-token",),
    ),
    Case(
        "merge_attention",
        "gap",
        lambda g: {
            "outs": torch.randn(3, 2, 5, 4, 64, generator=g),
            "lses": torch.randn(3, 2, 4, 5, generator=g) * 60,
        },
        lambda backend, outs, lses: longctx.merge_attention(outs, lses, backend=backend),
        lambda outs, lses: decode.merge_attention(outs, lses),
        keep_fp32=frozenset({"lses"}),
    ),
    Case(
        "lightning_attention",
        "state",
        lightning_inputs,
        lambda backend, **t: longctx.lightning_attention(**t, backend=backend),
        lambda **t: lightning.lightning_attention(**state_precision(**t)),
        ("initial-state",),
        frozenset({"log_decay", "initial_state"}),
        lambda **t: chunked_lightning(**t),
    ),
    Case(
        "lightning_decode",
        "step",
        lambda g: {
            **{n: torch.randn(2, 1, 4, 64, generator=g) for n in "qkv"},
            "state": torch.randn(2, 4, 64, 64, generator=g),
            "log_decay": torch.tensor([0.0, -5e-5, -0.05, -0.9]),
        },
        lambda backend, state, **t: stepped(longctx.lightning_decode, state, **t, backend=backend),
        lambda state, **t: step_oracle(state, **t),
        keep_fp32=frozenset({"log_decay", "state"}),
    ),
    Case(
        "quantize_fp8",
        "ue8m0",
        lambda g: {"x": torch.randn(3, 70, 128, generator=g) * 30},
        lambda backend, x: dequantized(
            longctx.quantize_fp8(x, scale_format="ue8m0", backend=backend)
        ),
        lambda x: dequantized(dsa.quantize_fp8(x, scale_format="ue8m0")),
        ("ue8m0",),
    ),
    Case(
        "index_scores",
        "causal",
        indexer_inputs,
        lambda backend, **t: (longctx.index_scores(**t, backend=backend),),
        lambda **t: (dsa.index_scores(**t),),
        keep_fp32=frozenset({"weights"}),
    ),
    Case(
        "index_topk",
        "chosen",
        indexer_inputs,
        lambda backend, q, k, weights: (
            chosen_scores(
                longctx.index_topk(q, k, None, weights, 1, backend=backend).indices, q, k, weights
            ),
        ),
        lambda q, k, weights: (
            chosen_scores(dsa.index_topk(q, k, None, weights, 1), q, k, weights),
        ),
        keep_fp32=frozenset({"weights"}),
    ),
    Case(
        "topk_attention",
        "gqa",
        topk_inputs,
        lambda backend, indices, **t: longctx.topk_attention_with_lse(
            **t, plan=topk_plan(indices), backend=backend
        ),
        lambda indices, **t: dsa.topk_attention(**t, plan=topk_plan(indices)),
    ),
    Case(
        "block_sparse_attention",
        "blocks",
        qkv(70, 90),
        lambda backend, **t: longctx.block_sparse_attention_with_lse(
            **t, plan=block_plan(t["q"].device), backend=backend
        ),
        lambda **t: block_sparse.block_sparse_attention(**t, plan=block_plan(t["q"].device)),
        ("block-plan", "per-kv-head"),
        capturable=False,
    ),
    Case(
        "block_sparse_attention",
        "window",
        qkv(70, 190),
        lambda backend, **t: longctx.block_sparse_attention_with_lse(
            **t, plan=longctx.WindowPlan(20, 5, 3), backend=backend
        ),
        lambda **t: block_sparse.block_sparse_attention(**t, plan=longctx.WindowPlan(20, 5, 3)),
        ("window-plan",),
    ),
    Case(
        "star_context_attention",
        "ragged",
        qkv(190, 190),
        lambda backend, **t: longctx.star_context_attention_with_lse(
            **t, block_size=48, anchor_size=16, backend=backend
        ),
        lambda **t: star.star_context_attention(**t, block_size=48, anchor_size=16),
    ),
    Case(
        "star_query_attention",
        "shards",
        qkv(5, 130),
        lambda backend, q, k, v: longctx.star_query_attention_with_lse(
            q, list(zip(k.split(50, 1), v.split(50, 1), strict=True)), backend=backend
        ),
        lambda q, k, v: flash.flash_attention(q, k, v, causal=True),
    ),
    Case(
        "token_scores",
        "pooled",
        qkv(16, 140),
        lambda backend, q, k, v: (longctx.token_scores(q, k, pool=5, backend=backend),),
        lambda q, k, v: (token_sparse.token_scores(q, k, pool=5),),
    ),
    Case(
        "select_tokens",
        "mass",
        lambda g: {"scores": torch.rand(2, 4, 140, generator=g) ** 4},
        lambda backend, scores: (
            longctx.select_tokens(scores, drop_mass=0.05, min_tokens=20, recent=9, backend=backend)
            .to_mask(1, 149)
            .double(),
        ),
        lambda scores: (
            token_sparse.select_tokens(scores, drop_mass=0.05, min_tokens=20, recent=9)
            .to_mask(1, 149)
            .double(),
        ),
        keep_fp32=frozenset({"scores"}),
        fp32_only=True,
    ),
    Case(
        "token_sparse_attention",
        "heads",
        qkv(120, 120),
        lambda backend, **t: longctx.token_sparse_attention_with_lse(
            **t, plan=token_plan(t["q"].device), backend=backend
        ),
        lambda **t: token_sparse.token_sparse_attention(**t, plan=token_plan(t["q"].device)),
        ("per-query-head",),
        capturable=False,
    ),
]


def cast(
    case: Case, made: Mapping[str, Any], device: str | torch.device, dtype: torch.dtype
) -> Tensors:
    """Return the inputs on a device, floating ones in a dtype unless the case keeps them fp32."""

    def one(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or name in case.keep_fp32:
            # fp64 is the oracle's run: its side inputs are double too
            wide = dtype == torch.float64 and tensor.is_floating_point()
            return tensor.to(device, torch.float64 if wide else tensor.dtype)
        return tensor.to(device, dtype)

    return {name: one(name, tensor) for name, tensor in made.items()}
