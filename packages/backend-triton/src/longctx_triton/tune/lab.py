"""The GPU at hand: what a session lets it compile, run, compare and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longctx.bench.timing import Clock, Spread, in_turns, spread_of

if TYPE_CHECKING:
    from longctx_triton.tune.compiling import Compiler

__all__ = ["Lab", "difference"]

ROWS = 1 << 16
"""Rows that are compared at a time, for the sake of memory."""
TOLERANCE = 2.0**-5
"""Of a row's size: half-precision weights that are added up otherwise differ by few roundings."""


class Lab:
    """Works on one GPU.

    Parameters
    ----------
    device : torch.device
    seconds : float
        Time for each call that is timed.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self._seconds = seconds
        self._clock = Clock(device)

    def compiler(self) -> Compiler:
        """Return a compiler to enter."""
        from longctx_triton.tune.compiling import Compiler  # Triton, where it is there

        return Compiler()

    def ready(
        self, call: Callable[[], Sequence[Tensor]]
    ) -> tuple[Callable[[], Any], Sequence[Tensor]]:
        """Run a call and return a replay of it, and the results that a replay has written.

        A replay of a CUDA graph costs the host next to nothing, whatever the call does before it
        launches.
        """
        call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        for result in results:
            result.fill_(torch.nan)  # so that what is not written shows
        graph.replay()
        torch.cuda.synchronize(self.device)
        return graph.replay, results

    def differ(self, results: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
        """Return how results differ by more than rounding; empty if they do not."""
        return difference(results, expected)

    def time(self, calls: Mapping[str, Callable[[], Any]], share: float) -> dict[str, Spread]:
        """Time calls in turns, the L2 cache flushed before each, each for a share of its time."""

        def failed(name: str, error: Exception) -> None:
            raise error

        times = in_turns(calls, self._clock, seconds=share * self._seconds, failed=failed)
        return {name: spread_of(found) for name, found in times.items()}


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Return how results differ from expected ones by more than rounding; empty if they do not.

    Rows are those of the last axis. Infinities must match, and nothing may be NaN.
    """
    for place, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        pieces = (torch.split(part.flatten(0, -2), ROWS) for part in (ours, theirs))
        wrong = sum(
            _wrong(mine.float(), right.float()) for mine, right in zip(*pieces, strict=True)
        )
        if wrong:
            return f"{wrong} entries of result {place} differ"
    return ""


def _wrong(mine: Tensor, right: Tensor) -> int:
    same = mine == right  # infinities, which have no difference
    finite = right.masked_fill(right.isinf(), 0)
    size = finite.square().mean(-1, keepdim=True).sqrt()
    near = (mine - right).abs() <= TOLERANCE * (size + finite.abs())
    return int((~(same | near)).sum())
