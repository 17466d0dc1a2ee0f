"""A context read once and asked about many times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longctx.protocols.kv_cache import KVCache
from longctx_models.generation import Generation, TextStream
from longctx_models.methods import Method
from longctx_models.run import Progress, Prompt
from longctx_models.sampling import SamplingOptions

if TYPE_CHECKING:
    from longctx_models.engine import LongContextLLM

__all__ = ["Reading"]


class Reading:
    """A context that was read once and can be asked about many times.

    Every question continues a fork of the context's cache. A method that must see the question to
    read the context (token-sparse) reads it again for each.

    Parameters
    ----------
    llm : LongContextLLM
    context : Prompt
        All of it context part.
    method : Method
    room : int
        Tokens of question and answer that a contiguous cache makes room for.
    on_prefill : callable, optional

    Attributes
    ----------
    cache : KVCache or None
        Keys and values of the context; None for a method that reads it with every question.
    seconds : float or None
        Time to read the context; None likewise.
    density : float or None
        Pairs attended / causal pairs while reading; None likewise.
    """

    def __init__(
        self,
        llm: LongContextLLM,
        context: Prompt,
        method: Method,
        room: int,
        on_prefill: Progress | None = None,
    ) -> None:
        self._llm, self._context, self._method = llm, context, method
        self.cache: KVCache | None = None
        self.seconds: float | None = None
        self.density: float | None = None
        self._pairs = (0.0, 0)
        run = llm._run(context, method, room)
        if run.policy.whole:
            return
        began = time.perf_counter()
        # the scores say when the device is done
        float(run.prefill(on_prefill)[0])
        self.seconds, self.density = time.perf_counter() - began, run.density
        self.cache, self._pairs = run.cache, run.pairs

    def ask(
        self,
        query: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Generation:
        """Return the continuation of context and query.

        Parameters are those of `LongContextLLM.generate`.

        Raises
        ------
        ValueError
            If the query is empty, or an argument is out of range.
        """
        return self.stream(
            query,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
        ).result

    def stream(
        self,
        query: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> TextStream:
        """Return `ask`'s text as it is generated; parameters are those of `ask`."""
        context = self._context.ids
        prompt = self._llm.prompt(context, query)
        if len(prompt.ids) == len(context):
            raise ValueError("the query is empty: a context that was read needs a question")
        return self._llm._open(
            prompt,
            self._method,
            max_new_tokens=max_new_tokens,
            options=SamplingOptions(temperature, top_k, top_p, seed),
            stop=stop,
            cache=None if self.cache is None else self.cache.fork(),
            pairs=self._pairs,
        )
