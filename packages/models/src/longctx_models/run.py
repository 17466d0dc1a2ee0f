"""One prompt: read into a cache chunk by chunk, then continued token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.protocols.kv_cache import KVCache
from longctx.protocols.selector import Phase
from longctx_models.architectures.llama import Decoder, Observe
from longctx_models.attention import CachedAttention
from longctx_models.generation import GenerationStats
from longctx_models.kernels import Kernels
from longctx_models.methods import Method

__all__ = ["Progress", "Prompt", "PromptRun"]

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in tokens."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, its context part first.

    Attributes
    ----------
    ids : tuple of int
    context_tokens : int
        How many of them are context; the rest is the query part.
    """

    ids: tuple[int, ...]
    context_tokens: int


class PromptRun:
    """One prompt and its continuation: a cache, and the attention over it.

    Parameters
    ----------
    model : Decoder
    kernels : Kernels
    prompt : Prompt
    method : Method
    new_cache : callable
        Makes a cache, as `longctx_models.caches.ContiguousCache`.
    chunk : int
        Prompt tokens read at once.
    room : int
        Tokens that may follow the prompt.
    cache : KVCache, optional
        Holds the beginning of the prompt already; what it lacks is read.
    pairs : (float, int)
        Pairs that were attended and all causal ones while that was read.

    Attributes
    ----------
    policy : Policy
    cache : KVCache
    pairs : (float, int)
        As the parameter, for all of the prompt once it is read.
    """

    def __init__(
        self,
        model: Decoder,
        kernels: Kernels,
        prompt: Prompt,
        method: Method,
        *,
        new_cache: Callable[..., KVCache],
        chunk: int,
        room: int,
        cache: KVCache | None = None,
        pairs: tuple[float, int] = (0.0, 0),
    ) -> None:
        self.model, self.prompt, self.method, self.chunk = model, prompt, method, chunk
        self.policy = method.policy(kernels, prompt.context_tokens)
        self.device, config = model.embedding.device, model.config
        self.length = len(prompt.ids)
        self.cache = cache or new_cache(
            config.num_layers,
            1,
            config.kv_heads,
            config.head_dim,
            dtype=model.embedding.dtype,
            device=self.device,
            # a cache that is cut never holds the prompt
            capacity=0 if self.policy.retain is not None else self.length + room,
        )
        self.attend = CachedAttention(config, kernels, self.cache, self.policy)
        self.pairs = pairs

    @torch.inference_mode()
    def prefill(self, progress: Progress | None = None, observe: Observe | None = None) -> Tensor:
        """Read what was not read yet of the prompt and return the scores of the next token."""
        ids = torch.tensor(self.prompt.ids, device=self.device).unsqueeze(0)
        watch = observe or self._by_layer(progress)
        x = None
        for start, end, phase in self._chunks():
            self.attend.phase = phase
            x = self._forward(ids[:, start:end], start, watch)
            if progress is not None:
                progress(end, self.length)
        if x is None:
            raise ValueError("nothing is left to read: the query part is empty")
        self.attend.phase = Phase.DECODE
        kept, total = self.attend.pairs()
        self.pairs = (self.pairs[0] + kept, self.pairs[1] + total)
        self.attend.forget_plans()
        return self.model.logits(x[:, -1:])[0, 0]

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Append one token and return the scores of the next."""
        ids = torch.tensor([[token]], device=self.device)
        self.length += 1
        x = self._forward(ids, self.length - 1)
        return self.model.logits(x)[0, 0]

    @property
    def density(self) -> float:
        """Pairs that the prefill attended / causal pairs, averaged over layers."""
        kept, total = self.pairs
        return kept / total if total else 1.0

    def stats(self, generated: int, prefill_seconds: float, seconds: float) -> GenerationStats:
        """Return what the run cost."""
        return GenerationStats(
            method=self.method.name,
            prompt_tokens=len(self.prompt.ids),
            generated_tokens=generated,
            prefill_seconds=prefill_seconds,
            decode_seconds=seconds,
            density=self.density,
            cache_bytes=self.cache.nbytes(),
        )

    def _forward(self, ids: Tensor, start: int, observe: Observe | None = None) -> Tensor:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x: Tensor = self.model(
            ids,
            positions,
            self.attend,
            length=self.length,
            last_row=observe is None and not self.policy.reads_queries,
            observe=observe,
        )
        return x

    def _chunks(self) -> list[tuple[int, int, Phase]]:
        """Return the pieces to read, none of which straddles context and query part."""
        read = self.cache.logical_length()
        if self.policy.whole and not read:
            return [(0, self.length, Phase.PREFILL)]
        split = max(read, self.prompt.context_tokens)
        return [
            (at, min(at + self.chunk, end), phase)
            for begin, end, phase in (
                (read, split, Phase.PREFILL),
                (split, self.length, Phase.APPEND),
            )
            for at in range(begin, end, self.chunk)
        ]

    def _by_layer(self, progress: Progress | None) -> Observe | None:
        """Report a prompt that is read in one piece by its layers."""
        if progress is None or not self.policy.whole:
            return None
        layers, length = self.model.config.num_layers, self.length
        return lambda layer, before, after: progress(length * (layer + 1) // layers, length)
