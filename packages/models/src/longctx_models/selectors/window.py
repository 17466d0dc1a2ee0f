"""Sinks and a sliding window: as a prefill plan (A-shape) and as a cache cut (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from longctx.plans import RetentionPlan, WindowPlan
from longctx.protocols.kv_cache import CacheView
from longctx.protocols.selector import Phase, SelectContext

__all__ = ["WindowRetention", "WindowSelector"]


@dataclass(frozen=True)
class WindowSelector:
    """Lets a query see the first tokens and the nearest ones (StreamingLLM, arXiv 2309.17453).

    Attributes
    ----------
    window : int
        Earlier tokens that a query sees besides itself.
    sink_tokens : int
        First tokens that every query sees.
    """

    window: int
    sink_tokens: int = 0
    plan: WindowPlan = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # one object for all layers and chunks: it never changes
        object.__setattr__(self, "plan", WindowPlan(self.window, self.sink_tokens))

    def select(self, context: SelectContext) -> WindowPlan | None:
        """Return the plan, or None while it would hide nothing."""
        return self.plan if key_length(context.k) > self.window + self.sink_tokens + 1 else None


@dataclass(frozen=True)
class WindowRetention:
    """Cuts a cache down to the first tokens and the last ones.

    The slots of a cut cache stand in their order, so a `WindowSelector` of the same sizes hides
    exactly the same tokens in a cut cache as in a whole one.

    Attributes
    ----------
    window, sink_tokens : int
        Tokens to keep, as in `WindowSelector`.
    slack : int
        While decoding, tokens that may gather beyond that before the cache is cut again.
    """

    window: int
    sink_tokens: int = 0
    slack: int = 0

    def select(self, context: SelectContext) -> RetentionPlan | None:
        """Return what to keep, or None while the cache is small enough."""
        held, keep = key_length(context.k), self.window + self.sink_tokens
        if held <= keep + (self.slack if context.phase is Phase.DECODE else 0):
            return None
        device = context.q.device
        slots = torch.cat(
            (
                torch.arange(self.sink_tokens, dtype=torch.int32, device=device),
                torch.arange(held - self.window, held, dtype=torch.int32, device=device),
            )
        )
        heads = (context.q.shape[0], kv_heads(context.k))
        counts = torch.full(heads, keep, dtype=torch.int32, device=device)
        return RetentionPlan(slots.expand(*heads, -1), counts)


def key_length(k: Tensor | CacheView) -> int:
    """Return the number of keys that a selector's context holds."""
    return k.length if isinstance(k, CacheView) else k.shape[1]


def kv_heads(k: Tensor | CacheView) -> int:
    """Return the number of KV heads that a selector's context holds."""
    return (k.k if isinstance(k, CacheView) else k).shape[2]
