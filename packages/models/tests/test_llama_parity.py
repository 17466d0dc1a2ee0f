"""Logits and greedy text equal transformers' own, for every architecture and option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx_models.attention import CachedAttention, Policy
from longctx_models.caches import ContiguousCache, PagedCache
from longctx_models.engine import LongContextLLM

LENGTH = 90
WINDOW = 16
ORIGINAL = 32
TOLERANCE = 1e-4

LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}


def rope(**parameters: Any) -> dict[str, Any]:
    """Return a config option with RoPE parameters."""
    return {"rope_parameters": {"rope_theta": 500.0, **parameters}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("llama", {**rope(**LLAMA3), "num_key_value_heads": 1}),
    "llama-tied": ("llama", {**rope(rope_type="default"), "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", rope(rope_type="linear", factor=3.0)),
    "llama-dynamic": (
        "llama",
        {**rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": ORIGINAL},
    ),
    "llama-yarn": ("llama", rope(**YARN)),
    "llama-yarn-mscale": (
        "llama",
        rope(**YARN, mscale=0.7, mscale_all_dim=1.0, beta_fast=16.0, truncate=False),
    ),
    "llama-longrope": ("llama", rope(**LONGROPE)),
    "llama-longrope-short": (
        "llama",
        rope(**{**LONGROPE, "original_max_position_embeddings": 100}),
    ),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "mistral-nemo": ("mistral", {"sliding_window": None, "head_dim": 12, "hidden_size": 36}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2-yarn-tied": ("qwen2", {**rope(**YARN), "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-all": (
        "qwen3",
        {
            **rope(**YARN, attention_factor=0.8),
            "head_dim": 10,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def all_logits(
    llm: LongContextLLM, ids: Sequence[int], chunks: Sequence[int], paged: bool
) -> Tensor:
    """Return the logits ``[T, V]`` of a sequence read in the given pieces."""
    c = llm.config
    kind = PagedCache if paged else ContiguousCache
    options = {"page_size": 8} if paged else {}
    cache = kind(c.num_layers, 1, c.kv_heads, c.head_dim, dtype=llm.dtype, **options)
    attend = CachedAttention(c, llm.kernels, cache, Policy())
    pieces, start = [], 0
    with torch.inference_mode():
        for size in chunks:
            positions = torch.arange(start, start + size)
            piece = torch.tensor([ids[start : start + size]])
            x = llm.model(piece, positions, attend, length=len(ids))
            pieces.append(llm.model.logits(x)[0])
            start += size
    assert start == len(ids)
    return torch.cat(pieces)


@pytest.fixture(params=CASES)
def pair(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path]
) -> tuple[Any, LongContextLLM, list[int]]:
    """Return transformers' model, ours, and token ids."""
    from transformers import AutoModelForCausalLM

    architecture, config = CASES[request.param]
    folder = checkpoint(architecture, **config)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ours = LongContextLLM.load(folder, device="cpu", dtype=torch.float32, max_positions=1000)
    generator = torch.Generator().manual_seed(1)
    return theirs, ours, torch.randint(2, 97, (LENGTH,), generator=generator).tolist()


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(
    "chunks",
    [[LENGTH], [37, 1, 29, 23], [WINDOW, 1, 1, 72], [1] * LENGTH],
    ids=["whole", "odd-chunks", "window-then-tokens", "token-by-token"],
)
def test_logits_equal_transformers(
    pair: tuple[Any, LongContextLLM, list[int]], chunks: list[int], paged: bool
) -> None:
    theirs, ours, ids = pair
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.5
    actual = all_logits(ours, ids, chunks, paged)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_greedy_ids_equal_transformers(pair: tuple[Any, LongContextLLM, list[int]]) -> None:
    theirs, ours, ids = pair
    prompt = ids[:20]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=200, do_sample=False, pad_token_id=0
    )[0, 20:].tolist()
    assert list(ours.generate(prompt, max_new_tokens=200).token_ids) == expected
