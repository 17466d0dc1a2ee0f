"""Token Sparse Attention's selection (arXiv 2602.03216): tokens that attention skips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import longctx
from longctx.plans import TokenSetPlan
from longctx.protocols.selector import Phase, SelectContext

__all__ = ["TokenSparseSelector"]


@dataclass(frozen=True)
class TokenSparseSelector:
    """Keeps, a head, the tokens that the last queries look at.

    Score: the attention that the last ``window`` queries give to a token, smoothed over ``pool``
    neighbours. Budget: the fewest tokens such that what is dropped holds at least ``drop_mass``
    of the score, one number for all heads; identity: the best tokens of each head. The last
    ``window`` tokens are always kept.

    Attributes
    ----------
    drop_mass : float
    window, pool, min_tokens : int
    scores, choose : callable
        `longctx.token_scores` and `longctx.select_tokens`, or bound forms of them.
    """

    drop_mass: float = 0.005
    window: int = 128
    pool: int = 7
    min_tokens: int = 1024
    scores: Callable[..., Tensor] = lambda *a, **k: longctx.token_scores(*a, **k)
    choose: Callable[..., TokenSetPlan] = lambda *a, **k: longctx.select_tokens(*a, **k)

    def select(self, context: SelectContext) -> TokenSetPlan | None:
        """Return the tokens to keep; None outside prefill and for prompts too short to gain."""
        if context.phase is not Phase.PREFILL or not isinstance(context.k, Tensor):
            return None
        if context.k.shape[1] <= self.min_tokens + self.window:
            return None
        recent = min(self.window, context.q.shape[1])
        scores = self.scores(
            context.q[:, -recent:], context.k, pool=self.pool, scale=context.scale
        )
        return self.choose(
            scores, drop_mass=self.drop_mass, min_tokens=self.min_tokens, recent=recent
        )
