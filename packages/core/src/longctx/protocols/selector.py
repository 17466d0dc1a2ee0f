"""The sparsity-selector protocol: pure functions from a context to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from longctx.plans import Plan
from longctx.protocols.kv_cache import CacheView

__all__ = ["Budget", "LayerChoice", "Phase", "SelectContext", "SelectorInfo", "SparsitySelector"]


class Phase(StrEnum):
    """When a selector is asked."""

    PREFILL = "prefill"
    APPEND = "append"
    DECODE = "decode"
    AFTER_PREFILL = "after-prefill"


@dataclass(frozen=True)
class Budget:
    """How much a selector may keep.

    Attributes
    ----------
    kind : str
        ``tokens`` (a count), ``ratio`` (a share of the tokens), ``keep-mass`` (a share of the
        score kept), ``drop-mass`` (a share dropped), ``relative-max`` (all above a share of the
        row's max).
    value : float
        In the unit of ``kind``.
    floor : int
        Never keep fewer tokens than this.
    sink_tokens, recent : int
        First and last tokens that are always kept.
    """

    kind: Literal["tokens", "ratio", "keep-mass", "drop-mass", "relative-max"]
    value: float
    floor: int = 0
    sink_tokens: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        whole = self.kind == "tokens"
        if not self.value >= 0 or (not whole and self.value > 1):
            limit = "at least 0" if whole else "between 0 and 1"
            raise ValueError(
                f"a budget of kind {self.kind!r} takes a value {limit}, got {self.value}"
            )
        for name in ("floor", "sink_tokens", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"budget {name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class SelectContext:
    """All that a selector may look at.

    Attributes
    ----------
    phase : Phase
    layer, num_layers : int
    q : Tensor, (batch, q_len, q_heads, head_dim)
        Queries of this call, positions already rotated in.
    k : Tensor, (batch, k_len, kv_heads, head_dim), or CacheView
        Keys so far, those of this call included.
    positions : Tensor, (batch, q_len), int64, or None
        Absolute positions; None means that the queries are the last ``q_len`` of ``k_len``.
    scale : float
        Softmax scale of the layer.
    auxiliary : mapping
        The cache's side state of this layer.
    earlier : mapping of int to Plan
        Plans of earlier layers of this call.
    """

    phase: Phase
    layer: int
    num_layers: int
    q: Tensor
    k: Tensor | CacheView
    scale: float
    positions: Tensor | None = None
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    earlier: Mapping[int, Plan] = field(default_factory=dict)


@runtime_checkable
class SparsitySelector(Protocol):
    """Chooses which keys (or tokens, blocks, cache slots) attention may touch."""

    def select(self, context: SelectContext) -> Plan | None:
        """Return a plan, or None for dense attention; pure, and without a host synchronisation."""
        ...


@runtime_checkable
class LayerChoice(Protocol):
    """Chooses the layers at which a selector is asked at all."""

    def applies(self, layer: int, num_layers: int) -> bool:
        """Return whether the selector is asked at ``layer`` (0-based)."""
        ...


@dataclass(frozen=True)
class SelectorInfo:
    """Metadata of a selector plugin.

    Attributes
    ----------
    name : str
        Unique name, such as ``"token-sparse"``.
    version : str
        Version of the distribution that brings it.
    protocol : (int, int)
        Protocol version it was written for.
    load : callable
        Imports and returns the selector's factory.
    description : str
        One line for listings.
    """

    name: str
    version: str
    protocol: tuple[int, int]
    load: Callable[[], Any]
    description: str = ""
