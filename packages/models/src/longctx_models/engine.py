"""Long-context generation: load a checkpoint, read a prompt by a method, write the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from longctx.protocols.kv_cache import KVCache
from longctx_models.architectures.llama import Decoder, Observe
from longctx_models.caches import cache_factory
from longctx_models.generation import DecodeLoop, Generation, TextStream
from longctx_models.kernels import Kernels
from longctx_models.loading import (
    load_config,
    load_method_defaults,
    load_model,
    resolve_checkpoint,
)
from longctx_models.methods import Method, make_method
from longctx_models.reading import Reading
from longctx_models.run import Progress, Prompt, PromptRun
from longctx_models.sampling import Sampler, SamplingOptions
from longctx_models.tokenizer import TextTokenizer

__all__ = ["LongContextLLM"]

QUERY_TOKENS = 128
"""Last tokens of a prompt without a stated query that count as its query part."""


class LongContextLLM:
    """A language model that reads long prompts by a choice of methods.

    Use `load` to make one.

    Parameters
    ----------
    model : Decoder
    kernels : Kernels
    tokenizer : TextTokenizer, optional
        Without one, prompts are token ids and the generated text is empty.
    method : str or Method
        Default method of `generate`.
    cache : str
        ``"contiguous"``, ``"paged"`` or the name of a cache that a plugin brings.
    prefill_chunk : int, optional
        Prompt tokens read at once; memory grows with it. Methods that must see the prompt whole
        read it in one piece whatever is said here.
    max_positions : int, optional
        Longest sequence; default: what the checkpoint is made for.
    method_defaults : mapping, optional
        Options by method name that suit the checkpoint (its ``longctx.json``).

    Examples
    --------
    >>> llm = LongContextLLM.load("needle")
    >>> out = llm.generate("The code of the safe is 4711.", query=" The code of the safe is:")
    >>> out.finish_reason
    'eos'
    """

    def __init__(
        self,
        model: Decoder,
        kernels: Kernels,
        tokenizer: TextTokenizer | None = None,
        *,
        method: str | Method = "dense",
        cache: str = "contiguous",
        prefill_chunk: int | None = None,
        max_positions: int | None = None,
        method_defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.model, self.kernels, self.tokenizer = model, kernels, tokenizer
        self.config = model.config
        self.method_defaults = method_defaults or {}
        self.method = self.make_method(method)
        self.cache = cache
        self._new_cache = cache_factory(cache)
        self.device, self.dtype = model.embedding.device, model.embedding.dtype
        default_chunk = 1024 if self.device.type == "cpu" else 8192
        self.prefill_chunk = default_chunk if prefill_chunk is None else prefill_chunk
        self.max_positions = self.config.max_positions if max_positions is None else max_positions
        for name, value in (
            ("prefill_chunk", self.prefill_chunk),
            ("max_positions", self.max_positions),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        backend: str | None = None,
        method: str | Method = "dense",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        cache: str = "contiguous",
        prefill_chunk: int | None = None,
        max_positions: int | None = None,
        tokenizer: TextTokenizer | str | None = "auto",
        progress: Progress | None = None,
    ) -> Self:
        """Load a local checkpoint directory, or a packaged checkpoint by name.

        Parameters
        ----------
        path : str or Path
            Directory in the Hugging Face layout, or a name such as ``"needle"``.
        backend : str, optional
            Attention backend; default: the best that can run the model.
        method, cache, prefill_chunk, max_positions
            See `LongContextLLM`.
        device : str or torch.device, optional
            Default: CUDA if there is one, else the CPU.
        dtype : torch.dtype, optional
            Default: the checkpoint's own type, bf16 where that is fp32. On a CPU it is fp32,
            unless the checkpoint is bf16 and the CPU multiplies bf16 natively (AMX): prompts are
            then read two to three times faster, and decoding is not slower.
        tokenizer : TextTokenizer, "auto" or None
            ``"auto"`` reads the checkpoint's tokenizer.json; None goes without.
        progress : callable, optional
            Told ``(tensors loaded, tensors in all)``.

        Raises
        ------
        CheckpointError
            If the checkpoint is missing, incomplete, damaged, unsafe or not supported.
        UnsupportedError
            If no backend, or not the one asked for, can run the model.
        ValueError
            If the device is not there.
        """
        folder = resolve_checkpoint(path)
        config = load_config(folder)
        defaults = load_method_defaults(folder)
        make_method(method)  # an unknown name is refused before the weights are read
        cache_factory(cache)
        texts = TextTokenizer.load(folder) if tokenizer == "auto" else tokenizer
        if isinstance(texts, str):
            raise ValueError(f"tokenizer must be a TextTokenizer, 'auto' or None, got {texts!r}")
        where = _device(device)
        kind = dtype or _default_dtype(where, config.dtype)
        kernels = Kernels(config, dtype=kind, device=where, backend=backend)
        kernels.resolve(paged=cache == "paged")
        model = load_model(folder, config, dtype=kind, device=where, progress=progress)
        return cls(
            model,
            kernels,
            texts,
            method=method,
            cache=cache,
            prefill_chunk=prefill_chunk,
            max_positions=max_positions,
            method_defaults=defaults,
        )

    def make_method(self, method: str | Method, /, **options: Any) -> Method:
        """Return a method by name, with the options that the checkpoint states for it.

        Parameters
        ----------
        method : str or Method
            As in `longctx_models.make_method`.
        **options
            Options of the caller's; they win over the checkpoint's.
        """
        stated = self.method_defaults.get(method, {}) if isinstance(method, str) else {}
        return make_method(method, **{**stated, **options})

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        query: str | Sequence[int] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        method: str | Method | None = None,
        on_text: Callable[[str], None] | None = None,
        on_prefill: Progress | None = None,
    ) -> Generation:
        """Read a prompt and write its continuation.

        Parameters
        ----------
        prompt : str or sequence of int
            The context part when ``query`` is given, else the whole prompt, of which the last 128
            tokens count as the query part. Token ids are taken as they are, text gets the
            tokenizer's BOS.
        query : str or sequence of int, optional
            What is asked about the context; tokenised apart from it.
        max_new_tokens : int
            Fewer are generated where the model's positions end.
        temperature, top_k, top_p, seed
            See `SamplingOptions`; the default is greedy.
        stop : str or sequence of str
            Strings that end the text; they are not part of it.
        method : str or Method, optional
            Default: the one given at loading.
        on_text : callable, optional
            Called with each piece of text as it comes.
        on_prefill : callable, optional
            Told ``(tokens read, tokens in all)`` while the prompt is read.

        Raises
        ------
        ValueError
            If an argument is out of range, or the prompt is empty or too long.
        """
        stream = self.stream(
            prompt,
            query=query,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            method=method,
            on_prefill=on_prefill,
        )
        for piece in stream:
            if on_text is not None:
                on_text(piece)
        return stream.result

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        query: str | Sequence[int] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        method: str | Method | None = None,
        on_prefill: Progress | None = None,
    ) -> TextStream:
        """Return an iterator over the text as it is generated; `TextStream.result` has the rest.

        Arguments are checked now, the prompt is read when the first piece is asked for. Parameters
        are those of `generate`.
        """
        return self._open(
            self.prompt(prompt, query),
            self.method if method is None else self.make_method(method),
            max_new_tokens=max_new_tokens,
            options=SamplingOptions(temperature, top_k, top_p, seed),
            stop=stop,
            on_prefill=on_prefill,
        )

    def read(
        self,
        context: str | Sequence[int],
        *,
        method: str | Method | None = None,
        room: int = 1024,
        on_prefill: Progress | None = None,
    ) -> Reading:
        """Read a context once, to ask several questions about it (`Reading.ask`).

        Parameters
        ----------
        context : str or sequence of int
        method, on_prefill
            As in `generate`.
        room : int
            Tokens of question and answer that a contiguous cache makes room for; beyond them the
            context is copied.

        Raises
        ------
        ValueError
            If the context is empty or too long.
        """
        chosen = self.method if method is None else self.make_method(method)
        return Reading(self, self.prompt(context, query=()), chosen, room, on_prefill)

    def _open(
        self,
        asked: Prompt,
        method: Method,
        *,
        max_new_tokens: int,
        options: SamplingOptions,
        stop: str | Sequence[str],
        on_prefill: Progress | None = None,
        cache: KVCache | None = None,
        pairs: tuple[float, int] = (0.0, 0),
    ) -> TextStream:
        """Check what was asked for and return the stream that will answer."""
        sampler = Sampler(options)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        if stops and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: the model was loaded without one")
        limit = min(max_new_tokens, self.max_positions - len(asked.ids) + 1)
        run = self._run(asked, method, limit, cache, pairs)
        return TextStream(
            DecodeLoop(
                prefill=lambda: run.prefill(on_prefill),
                step=run.step,
                stats=run.stats,
                sampler=sampler,
                tokenizer=self.tokenizer,
                prompt=asked.ids,
                eos_ids=frozenset(self.config.eos_ids),
                stops=stops,
                limit=limit,
            )
        )

    def prompt(
        self, prompt: str | Sequence[int], query: str | Sequence[int] | None = None
    ) -> Prompt:
        """Return the token ids of a prompt and where its query part begins.

        Raises
        ------
        ValueError
            If it is empty, longer than the model's positions, or holds ids beyond the vocabulary.
        """
        context = self._ids(prompt, first=True)
        ids = context + (self._ids(query, first=not context) if query is not None else [])
        split = len(context) if query is not None else max(0, len(ids) - QUERY_TOKENS)
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        if len(ids) > self.max_positions:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the model is made for {self.max_positions}: "
                "shorten it, or load the model with a larger max_positions to go beyond"
            )
        worst = max(ids) if min(ids) >= 0 else min(ids)
        if not 0 <= worst < self.config.vocab_size:
            raise ValueError(
                f"token id {worst} lies outside the vocabulary of {self.config.vocab_size}"
            )
        return Prompt(tuple(ids), split)

    @torch.inference_mode()
    def prefill_logits(
        self,
        prompt: str | Sequence[int],
        *,
        query: str | Sequence[int] | None = None,
        method: str | Method | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Read a prompt and return the scores of the token that follows, fp32 ``[vocab]``.

        Parameters
        ----------
        prompt, query, method
            As in `generate`.
        observe : callable, optional
            Sees the residual stream around every layer, such as a `DriftMeter`.
        """
        chosen = self.method if method is None else self.make_method(method)
        return self._run(self.prompt(prompt, query), chosen, 1).prefill(observe=observe)

    def _run(
        self,
        prompt: Prompt,
        method: Method,
        room: int,
        cache: KVCache | None = None,
        pairs: tuple[float, int] = (0.0, 0),
    ) -> PromptRun:
        return PromptRun(
            self.model,
            self.kernels,
            prompt,
            method,
            new_cache=self._new_cache,
            chunk=self.prefill_chunk,
            room=room,
            cache=cache,
            pairs=pairs,
        )

    def _ids(self, prompt: str | Sequence[int], *, first: bool) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("the model was loaded without a tokenizer: give token ids")
        return self.tokenizer.encode(prompt, first=first)


def _device(asked: str | torch.device | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    device = torch.device(asked if asked is not None else "cuda" if has_gpu else "cpu")
    if device.type == "cuda" and not has_gpu:
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch sees no CUDA GPU: use device='cpu'"
        )
    return device


def _default_dtype(device: torch.device, stated: torch.dtype | None) -> torch.dtype:
    if device.type != "cpu":
        return torch.bfloat16 if stated in (None, torch.float32) else stated
    # without the tile instructions, bf16 products are emulated: right, but slower than fp32
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return torch.bfloat16 if has_tiles and stated is torch.bfloat16 else torch.float32
