"""The decode loop and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from longctx_models.sampling import Sampler
from longctx_models.tokenizer import Detokenizer, StopFilter, TextTokenizer

__all__ = ["FinishReason", "Generation", "GenerationStats", "TextStream"]

FinishReason = Literal["eos", "stop", "length"]
"""An end-of-text token, a stop string, or ``max_new_tokens`` (or the model's last position)."""


@dataclass(frozen=True)
class GenerationStats:
    """What a generation cost.

    Attributes
    ----------
    method : str
    prompt_tokens, generated_tokens : int
    prefill_seconds : float
        Until the first token was chosen.
    decode_seconds : float
        For the tokens after the first.
    density : float
        Pairs that the prefill attended / causal pairs, averaged over layers.
    cache_bytes : int
        Memory of the KV cache at the end.
    """

    method: str
    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    density: float
    cache_bytes: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens generated a second, the first one left out."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes
    ----------
    text : str
        Generated text, without the stop string or the end-of-text token.
    token_ids : tuple of int
        Every token that the model chose, an end-of-text token included.
    finish_reason : {"eos", "stop", "length"}
    stats : GenerationStats
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        stats = asdict(self.stats) | {
            "prefill_tokens_per_second": self.stats.prefill_tokens_per_second,
            "decode_tokens_per_second": self.stats.decode_tokens_per_second,
        }
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "stats": stats,
        }


@dataclass(frozen=True)
class DecodeLoop:
    """What the loop needs of a model and a prompt that was not read yet.

    Attributes
    ----------
    prefill : callable
        Reads the prompt and returns the scores ``[V]`` of the next token.
    step : callable
        Takes a token and returns the scores of the next one.
    stats : callable
        Takes ``(generated, prefill_seconds, decode_seconds)`` and returns the statistics.
    sampler : Sampler
    tokenizer : TextTokenizer or None
        None: the text stays empty.
    prompt : sequence of int
    eos_ids : frozenset of int
    stops : tuple of str
    limit : int
        Tokens to generate at most.
    """

    prefill: Callable[[], Tensor]
    step: Callable[[int], Tensor]
    stats: Callable[[int, float, float], GenerationStats]
    sampler: Sampler
    tokenizer: TextTokenizer | None
    prompt: Sequence[int]
    eos_ids: frozenset[int]
    stops: tuple[str, ...]
    limit: int


class TextStream:
    """Iterates over the pieces of a text while it is generated; `result` is there afterwards."""

    def __init__(self, loop: DecodeLoop) -> None:
        self._loop = loop
        self._result: Generation | None = None
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        """The whole generation; what was not iterated over yet is generated first."""
        for _ in self._pieces:
            pass
        if self._result is None:
            raise RuntimeError("the stream was closed before its text was finished")
        return self._result

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        loop, text, tokens = self._loop, [], list[int]()
        detokenizer = None if loop.tokenizer is None else Detokenizer(loop.tokenizer, loop.prompt)
        stops = StopFilter(loop.stops)
        began = time.perf_counter()
        token = loop.sampler(loop.prefill())
        first = time.perf_counter()
        while True:
            tokens.append(token)
            ended = token in loop.eos_ids
            piece = "" if ended or detokenizer is None else stops.push(detokenizer.push(token))
            if ended or stops.stopped or len(tokens) == loop.limit:
                break
            if piece:
                text.append(piece)
                yield piece
            token = loop.sampler(loop.step(token))
        seconds = time.perf_counter() - first
        if detokenizer is not None and not stops.stopped:
            piece += stops.push(detokenizer.flush())
            if not stops.stopped:
                piece += stops.flush()
        if piece:
            text.append(piece)
            yield piece
        reason: FinishReason = "stop" if stops.stopped else "eos" if ended else "length"
        stats = loop.stats(len(tokens), first - began, seconds)
        self._result = Generation("".join(text), tuple(tokens), reason, stats)
