"""Long-context methods by name, each a dataclass of its options.

A prompt has a context part and a query part (see `longctx_models.LongContextLLM.generate`); a
method says how each is attended, what generated tokens see, and what the cache keeps.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, ClassVar, Protocol, runtime_checkable

from longctx.errors import BackendNotFoundError, nearest_name
from longctx.plugins import registry
from longctx.protocols.selector import LayerChoice, SparsitySelector
from longctx_models.attention import Policy
from longctx_models.kernels import Kernels
from longctx_models.selectors.layers import AllLayers, SecondHalf, parse_layers
from longctx_models.selectors.star import StarPlan, StarSelector
from longctx_models.selectors.token_sparse import TokenSparseSelector
from longctx_models.selectors.window import WindowRetention, WindowSelector

__all__ = [
    "METHODS",
    "AShape",
    "Dense",
    "Method",
    "SelectorMethod",
    "Star",
    "StreamingLLM",
    "TokenSparse",
    "make_method",
]


@runtime_checkable
class Method(Protocol):
    """A long-context method with its options."""

    @property
    def name(self) -> str:
        """The name that users type."""
        ...

    def policy(self, kernels: Kernels, context_tokens: int) -> Policy:
        """Return what to do with a context of so many tokens."""
        ...


@dataclass(frozen=True)
class Dense:
    """Exact attention everywhere."""

    name: ClassVar[str] = "dense"

    def policy(self, kernels: Kernels, context_tokens: int) -> Policy:
        """Return a policy without selectors."""
        return Policy(reads_queries=False)


@dataclass(frozen=True)
class AShape:
    """Sinks and a sliding window while the context is read; everything else sees the whole cache.

    Attributes
    ----------
    sink_tokens : int
        First tokens that every context token sees.
    window : int, optional
        Earlier tokens that a context token sees besides itself; default: an eighth of the context,
        at least 256.
    dense_query : bool
        Whether the query part sees all of the context (also called tri-shape), or the window too.
    """

    sink_tokens: int = 64
    window: int | None = None
    dense_query: bool = True
    name: ClassVar[str] = "a-shape"

    def __post_init__(self) -> None:
        _at_least(0, sink_tokens=self.sink_tokens, window=self.window)

    def policy(self, kernels: Kernels, context_tokens: int) -> Policy:
        """Return a window in prefill alone."""
        window = max(256, context_tokens // 8) if self.window is None else self.window
        selector = WindowSelector(window, self.sink_tokens)
        return Policy(
            prefill=selector,
            append=None if self.dense_query else selector,
            reads_queries=False,
        )


@dataclass(frozen=True)
class StreamingLLM:
    """Sinks and a sliding window for every token, the cache cut to them (arXiv 2309.17453).

    What has left the window is gone for good: memory and time a token stay constant, the middle of
    the context cannot be asked about. Keys stay rotated to the positions at which they were read;
    they are not moved together as in the paper, so the context may not outgrow the model's
    positions.

    Attributes
    ----------
    sink_tokens : int
        First tokens, always kept.
    window : int
        Last tokens kept besides the present one.
    """

    sink_tokens: int = 4
    window: int = 2044
    name: ClassVar[str] = "streaming-llm"

    def __post_init__(self) -> None:
        _at_least(0, sink_tokens=self.sink_tokens, window=self.window)

    def policy(self, kernels: Kernels, context_tokens: int) -> Policy:
        """Return the same window in every phase, and the cut."""
        selector = WindowSelector(self.window, self.sink_tokens)
        # cutting copies the window: let an eighth of it gather first
        retain = WindowRetention(self.window, self.sink_tokens, slack=self.window // 8)
        return Policy(
            prefill=selector,
            append=selector,
            decode=selector,
            retain=retain,
            reads_queries=False,
        )


@dataclass(frozen=True)
class Star:
    """Star Attention (arXiv 2411.17116): blocks that see themselves and the first one.

    The query part and generated tokens see the whole cache.

    Attributes
    ----------
    block_size : int, optional
        Default: a quarter of the context, the authors' rule up to 128K.
    anchor_size : int, optional
        First tokens that every block sees; default: a block.
    """

    block_size: int | None = None
    anchor_size: int | None = None
    name: ClassVar[str] = "star"

    def __post_init__(self) -> None:
        _at_least(1, block_size=self.block_size)
        _at_least(0, anchor_size=self.anchor_size)
        if self.block_size is not None and (self.anchor_size or 0) > self.block_size:
            raise ValueError(
                f"anchor_size {self.anchor_size} must not exceed block_size {self.block_size}"
            )

    def policy(self, kernels: Kernels, context_tokens: int) -> Policy:
        """Return star blocks for the context."""
        block = max(1, -(-context_tokens // 4)) if self.block_size is None else self.block_size
        anchor = block if self.anchor_size is None else min(self.anchor_size, block)
        return Policy(prefill=StarSelector(StarPlan(block, anchor)), reads_queries=False)


@dataclass(frozen=True)
class TokenSparse:
    """Token Sparse Attention (arXiv 2602.03216): some layers skip the tokens nobody looks at.

    A skipped token passes a layer's attention by (only its residual goes on), its key stays in the
    cache; generated tokens see everything. The scores come from the last tokens of the prompt,
    so the prompt is read in one piece, query part included.

    Attributes
    ----------
    drop_mass : float
        Share of the attention score that may be dropped; 0.005 is the authors' for Llama-3.1-8B.
    window : int
        Last tokens whose attention scores the others; always kept.
    pool : int
        Neighbours over which scores are averaged.
    min_tokens : int
        Never keep fewer tokens; prompts no longer than this and the window are read densely.
    layers : LayerChoice
        Sparse layers; a string is parsed by `parse_layers`. Default: the second half, where hidden
        states drift least.
    """

    drop_mass: float = 0.005
    window: int = 128
    pool: int = 7
    min_tokens: int = 1024
    layers: LayerChoice = field(default_factory=SecondHalf)
    name: ClassVar[str] = "token-sparse"

    def __post_init__(self) -> None:
        _at_least(1, window=self.window, pool=self.pool)
        _at_least(0, min_tokens=self.min_tokens)
        if not 0 <= self.drop_mass < 1:
            raise ValueError(f"drop_mass must be at least 0 and below 1, got {self.drop_mass}")
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, got {self.pool}")

    def policy(self, kernels: Kernels, context_tokens: int) -> Policy:
        """Return the selection for a prompt read in one piece."""
        selector = TokenSparseSelector(
            self.drop_mass,
            self.window,
            self.pool,
            self.min_tokens,
            kernels.token_scores,
            kernels.select_tokens,
        )
        return Policy(prefill=selector, layers=self.layers, whole=True)


@dataclass(frozen=True)
class SelectorMethod:
    """Any selector, asked while the context is read; the rest sees the whole cache.

    Attributes
    ----------
    selector : SparsitySelector
    layers : LayerChoice
    whole : bool
        Whether it must see the prompt in one piece.
    name : str
    """

    selector: SparsitySelector
    layers: LayerChoice = field(default_factory=AllLayers)
    whole: bool = False
    name: str = "selector"

    def policy(self, kernels: Kernels, context_tokens: int) -> Policy:
        """Return the selector in prefill."""
        return Policy(prefill=self.selector, layers=self.layers, whole=self.whole)


METHODS: Mapping[str, type[Method]] = {
    method.name: method for method in (Dense, AShape, StreamingLLM, Star, TokenSparse)
}
"""The built-in methods by name."""


def make_method(method: str | Method, /, **options: Any) -> Method:
    """Return a method from its name and options.

    Parameters
    ----------
    method : str or Method
        A name in `METHODS`, the name of a selector that a plugin brings, or a method, taken as
        it is.
    **options
        The method's fields; strings are converted, so that they may come from a command line.

    Raises
    ------
    BackendNotFoundError
        If nobody brings the name; the message has the nearest one.
    ValueError
        If an option is unknown or out of range.

    Examples
    --------
    >>> make_method("star", block_size="1024")
    Star(block_size=1024, anchor_size=None)
    """
    if not isinstance(method, str):
        if options:
            raise ValueError(
                f"options {sorted(options)} go with a method's name, not with a method"
            )
        return method
    if method in METHODS:
        kind = METHODS[method]
        return kind(**_converted(method, kind, options))
    selectors = registry().selectors
    if method in selectors:
        factory = selectors[method].load()
        if dataclasses.is_dataclass(factory) and isinstance(factory, type):
            options = _converted(method, factory, options)
        return SelectorMethod(factory(**options), name=method)
    raise BackendNotFoundError(
        f"no method is called {method!r}: {nearest_name(method, {*METHODS, *selectors})}"
    )


def _converted(method: str, kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    names = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}
    converted = {}
    for name, value in options.items():
        if name not in names:
            raise ValueError(
                f"method {method!r} has no option {name!r}: {nearest_name(name, names)}"
            )
        converted[name] = _convert(name, names[name], value)
    return converted


def _convert(name: str, hint: Any, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if isinstance(hint, UnionType):
        if value.lower() in ("none", "auto"):
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if hint is LayerChoice:
        return parse_layers(value)
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value.lower() == "true"
    try:
        return hint(value)
    except ValueError:
        raise ValueError(f"{name} must be {hint.__name__}, got {value!r}") from None


def _at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
