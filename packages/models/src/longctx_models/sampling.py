"""Choosing the next token from its scores: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.errors import LongctxError

__all__ = ["Sampler", "SamplingOptions", "token_probabilities"]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn; filters apply in the order temperature, top-k, top-p.

    Attributes
    ----------
    temperature : float
        0 is greedy; scores are divided by it otherwise.
    top_k : int, optional
        Keep the best tokens only; of equal scores the lower id goes first.
    top_p : float, optional
        Keep the fewest best tokens that reach this probability together.
    seed : int, optional
        The same seed draws the same text from the same scores, on any device.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature}"
            )
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k < 1):
            raise ValueError(f"top_k must be at least 1, or None for no limit, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")


def token_probabilities(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Return the distribution that `Sampler` draws from.

    Parameters
    ----------
    logits : Tensor, (vocab,), float32
    options : SamplingOptions
        With a temperature above 0.

    Returns
    -------
    probabilities : Tensor, (kept,), float32
        Descending, of sum 1.
    tokens : Tensor, (kept,), int64
        The ids they belong to.
    """
    scores, tokens = torch.sort(logits, descending=True, stable=True)
    if options.top_k is not None:
        scores, tokens = scores[: options.top_k], tokens[: options.top_k]
    # subtracting the maximum first keeps tiny temperatures from overflowing
    probabilities = torch.softmax((scores - scores[0]) / options.temperature, -1)
    if options.top_p is not None and options.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        kept = max(1, int((before < options.top_p).sum()))
        probabilities, tokens = probabilities[:kept], tokens[:kept]
        probabilities = probabilities / probabilities.sum()
    return probabilities, tokens


class Sampler:
    """Draws tokens one after the other.

    Parameters
    ----------
    options : SamplingOptions
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> int:
        """Return the next token.

        Parameters
        ----------
        logits : Tensor, (vocab,), float32

        Raises
        ------
        LongctxError
            If the best score is not finite: the model overflowed.
        """
        best = int(logits.argmax())
        if not math.isfinite(float(logits[best])):
            raise LongctxError(
                "the model's scores are not finite: load it with dtype=torch.bfloat16 or "
                "torch.float32"
            )
        if self.options.temperature == 0:
            return best
        probabilities, tokens = token_probabilities(logits, self.options)
        # a uniform number drawn on the CPU makes the draw independent of the device's generator
        draw = torch.rand((), generator=self._generator, dtype=torch.float64)
        edges = probabilities.double().cumsum(-1)
        at = int(torch.searchsorted(edges, draw.to(edges.device) * edges[-1], right=True))
        return int(tokens[min(at, len(tokens) - 1)])
