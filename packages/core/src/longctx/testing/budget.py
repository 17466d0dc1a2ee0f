"""A tolerance from the data: how wrong a result may be, given what its precision can do.

The error against the fp64 oracle may be at most twice that of an independent computation in the
same precision, plus a rounding band of the output's dtype: one step for 16 bits and less, where
the sums behind the output are kept more exactly, and sixteen for fp32, where they are not and the
order of summation alone moves a result by several steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Budget", "assert_within_budget", "error_budget"]

_FP32_STEPS = 16


@dataclass(frozen=True)
class Budget:
    """How an error compares with what is allowed.

    Attributes
    ----------
    error : float
        Largest absolute difference from the exact result.
    allowed : float
        Largest absolute difference that passes.
    """

    error: float
    allowed: float

    @property
    def used(self) -> float:
        """Share of the budget that the error takes; above 1 fails."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed else float("inf")


def error_budget(actual: Tensor, exact: Tensor, low_precision: Tensor) -> Budget:
    """Measure a result against the oracle and an independent low-precision result.

    Parameters
    ----------
    actual : Tensor
        The result under test.
    exact : Tensor
        The oracle's result in fp64; infinities must match exactly.
    low_precision : Tensor
        The same formula evaluated independently in the precision of the inputs.

    Returns
    -------
    Budget
        ``error`` is inf where ``actual`` has NaN, or infinities that ``exact`` does not share.
    """
    # an fp8 or 16-bit output rounds more coarsely than the formula that made it
    band = torch.finfo(low_precision.dtype).eps
    if low_precision.dtype == torch.float32:
        band *= _FP32_STEPS
    exact, actual, low_precision = (t.double().cpu() for t in (exact, actual, low_precision))
    finite = exact.isfinite()
    scale = float(exact[finite].abs().max()) if finite.any() else 0.0
    allowed = 2.0 * (_largest(low_precision - exact, finite) + band * scale)
    if not torch.equal(actual[~finite], exact[~finite]) or not actual[finite].isfinite().all():
        return Budget(float("inf"), allowed)
    return Budget(_largest(actual - exact, finite), allowed)


def assert_within_budget(
    actual: Tensor, exact: Tensor, low_precision: Tensor, *, name: str = "result"
) -> Budget:
    """Fail with the figures if a result exceeds its `error_budget`; return it otherwise."""
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    budget = error_budget(actual, exact, low_precision)
    assert budget.used <= 1.0, (
        f"{name}: max error {budget.error:.3e}, allowed {budget.allowed:.3e} from the data"
    )
    return budget


def _largest(difference: Tensor, where: Tensor) -> float:
    return float(difference[where].abs().max()) if where.any() else 0.0
