"""Right before fast: results against what fp64 says they are, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Expectation", "Outputs", "Verdict", "judge", "rounding_of"]

Outputs = dict[str, Tensor]
"""What a contestant computed, by name, in longctx's own layout."""


@dataclass(frozen=True)
class Expectation:
    """Part of a result that was also computed exactly.

    Attributes
    ----------
    what : str
        Name for messages.
    pick : callable
        Takes that part out of a contestant's outputs.
    exact : Tensor
        In fp64; infinities must match.
    low : Tensor
        The same formula in fp32, rounded as the output is.
    rounding : float
        Relative rounding error of the op's precision.
    by_row : bool
        Whether each row is allowed what its own ``low`` is off, not what the worst row's is.
    """

    what: str
    pick: Callable[[Outputs], Tensor]
    exact: Tensor
    low: Tensor
    rounding: float
    by_row: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """The largest error of a result, and what the data allow, relative to each row's maximum.

    Attributes
    ----------
    what : str
        Where it was found.
    error, allowed : float
    """

    what: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the error is within what is allowed; NaN is not."""
        return self.error <= self.allowed


def rounding_of(dtype: torch.dtype, *, backward: bool = False) -> float:
    """Return the relative rounding error that an op on inputs of this type may have.

    The machine epsilon of a 16-bit type; twice that for a gradient, whose way leads over two
    rounded matrices, the weights and their gradient. Sums in fp32 round at every step, in an order
    of their own: sixteen epsilons. Products of fp8 are exact, but the accumulator of Hopper's
    matrix units keeps about 12 bits of their sum.
    """
    if dtype.itemsize == 1:
        return 2.0**-11
    steps = (2 if backward else 1) if dtype.itemsize == 2 else 16
    return steps * torch.finfo(dtype).eps


def judge(outputs: Outputs, expectations: Iterable[Expectation]) -> Verdict:
    """Compare a result with its expectations and return the worst comparison.

    Errors are relative to the largest entry of each row of the exact result (of the median row,
    if that is more), so that late rows of long sequences, whose entries are small, count as much
    as early ones. Allowed is twice the
    error of the fp32 formula plus one rounding, as in `longctx.testing.budget`.
    """
    worst = Verdict("", 0.0, 0.0)
    share = -1.0
    for expected in expectations:
        verdict = _compare(expected, expected.pick(outputs))
        if verdict.error != verdict.error:
            return Verdict(expected.what, float("inf"), verdict.allowed)
        used = verdict.error / max(verdict.allowed, 1e-300)
        if used > share:
            worst, share = verdict, used
    return worst


def _compare(expected: Expectation, actual: Tensor) -> Verdict:
    exact, low = expected.exact.double(), expected.low.double()
    if actual.shape != exact.shape:
        return Verdict(f"shape of {expected.what}", float("inf"), 0.0)
    actual = actual.to(exact.device).double()
    finite = exact.isfinite()
    # masked_fill keeps infinities, which must match exactly, out of the arithmetic
    rows = exact.masked_fill(~finite, 0).abs().amax(-1, keepdim=True)
    # a row that cancels, such as dq of a query with one key, is nothing but rounding
    rows = rows.clamp(min=max(float(rows.median()), torch.finfo(torch.float32).tiny))
    if expected.by_row and bool(finite.all()):
        errors = ((actual - exact) / rows).abs().amax(-1)
        budgets = 2 * (((low - exact) / rows).abs().amax(-1) + expected.rounding)
        # NaN is the largest
        worst = (errors / budgets).flatten().argmax()
        return Verdict(
            expected.what, float(errors.flatten()[worst]), float(budgets.flatten()[worst])
        )
    allowed = 2 * (_largest((low - exact) / rows, finite) + expected.rounding)
    if not torch.equal(actual[~finite], exact[~finite]):
        return Verdict(expected.what, float("inf"), allowed)
    return Verdict(expected.what, _largest((actual - exact) / rows, finite), allowed)


def _largest(difference: Tensor, where: Tensor) -> float:
    return float(difference[where].abs().max()) if bool(where.any()) else 0.0
