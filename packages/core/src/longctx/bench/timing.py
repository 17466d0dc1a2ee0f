"""Times of calls that take turns: events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Clock", "Spread", "in_turns", "spread_of"]

L2_FLUSH_BYTES = 256 * 2**20
"""More than any cache holds; writing it also lets the host run ahead of a GPU."""

MOST_ROUNDS = 200
FEWEST_ROUNDS = 3
HOST_RUNS = 15
FEWEST_HOST_RUNS = 3
HOST_CALLS = 40
HOST_SECONDS = 0.06
"""Time of the GPU for the runs of one host figure: slower calls get fewer."""

HOST_RUN_SECONDS = 2e-3
"""Longest run on the host: fewer launches than the 1024 that a GPU's queue holds, at 2 us each."""

PATIENCE = 5
"""A call that takes this many times the budget is timed once."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the 20 % and 80 % quantiles, in seconds.

    Attributes
    ----------
    low, median, high : float
    rounds : int
    """

    low: float
    median: float
    high: float
    rounds: int


def spread_of(times: Sequence[float]) -> Spread:
    """Return the spread of some times."""
    if len(times) == 1:
        return Spread(times[0], times[0], times[0], 1)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Spread(fifths[0], statistics.median(times), fifths[3], len(times))


class Clock:
    """Measures single calls on a device; the L2 cache of a GPU is flushed before each.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the time of one call.

        On a GPU, from the first kernel's start to the last one's end: the host's work is hidden
        behind the flush as far as it is shorter.
        """
        if self._flush is None:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        torch.cuda.synchronize(self._device)
        start, stop = _event(), _event()
        self._flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def host_seconds(self, call: Callable[[], Any], taken: float) -> float | None:
        """Return what a call costs the host: the least of runs of calls that nobody waits for.

        None on a CPU, where the call is the work.

        The least, because all that a machine does besides (other processes, interrupts, a
        collection of garbage, a clock that is slow to rise) adds to a run and nothing takes away
        from it: the least run of two recordings is the same call's cost, their medians differ by
        what disturbed them. Within a run the mean, because what some calls put off for a later one
        is part of their cost. Each run starts with an idle GPU and is too short to fill its
        queue: a host that waits for room there is timed at the GPU's pace.

        Parameters
        ----------
        call : callable
        taken : float
            Seconds of one call on the GPU. As many runs as fit, of as many calls: 15 of 40 where
            they are fast, 3 of one where they are slow.
        """
        if self._flush is None:
            return None

        def run(calls: int) -> float:
            torch.cuda.synchronize(self._device)
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - begin) / calls

        fitting = int(HOST_SECONDS / taken)
        calls = max(1, min(HOST_CALLS, fitting // HOST_RUNS))
        if calls > 1:
            single = min(run(1) for _ in range(FEWEST_HOST_RUNS))
            calls = max(1, min(calls, int(HOST_RUN_SECONDS / single)))
        runs = min(HOST_RUNS, max(FEWEST_HOST_RUNS, fitting // calls))
        least = min(run(calls) for _ in range(runs))
        torch.cuda.synchronize(self._device)
        return least


def _event() -> Any:
    event: Any = torch.cuda.Event
    return event(enable_timing=True)


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    clock: Clock,
    *,
    seconds: float,
    failed: Callable[[str, Exception], None],
) -> dict[str, list[float]]:
    """Time calls in rounds, each call once a round, so that what disturbs one disturbs all.

    Parameters
    ----------
    calls : mapping of str to callable
        Each has run before: nothing is left to compile. One more call each, which does not
        count, tells how many rounds the budget holds.
    clock : Clock
    seconds : float
        Time for each call: a slow one sits out the later rounds. At least three rounds are run,
        unless one takes far longer.
    failed : callable
        Told of a call that raised; it takes no more part.

    Returns
    -------
    dict of str to list of float
        Seconds of each call's rounds, first round first, of the calls that never raised.
    """
    alive = dict(calls)

    def once(name: str) -> float | None:
        try:
            return clock.seconds(alive[name])
        except Exception as error:
            del alive[name]
            failed(name, error)
            return None

    firsts = {name: once(name) for name in list(alive)}
    rounds = {name: _rounds(t, seconds) for name, t in firsts.items() if t is not None}
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for turn in range(max(rounds.values(), default=0)):
        for name in [name for name in alive if turn < rounds[name]]:
            taken = once(name)
            if taken is not None:
                times[name].append(taken)
    return {name: times[name] for name in alive}


def _rounds(taken: float, seconds: float) -> int:
    if taken > PATIENCE * seconds:
        return 1
    return min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / max(taken, 1e-9))))
