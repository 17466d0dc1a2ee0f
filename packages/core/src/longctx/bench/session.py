"""One case after the other: check every contestant, then time those that are right, in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from longctx.bench.case import Case
from longctx.bench.ceilings import Ceilings
from longctx.bench.checking import Expectation, Verdict, judge
from longctx.bench.contestants import Contestant, PeerContestant
from longctx.bench.counting import work_of
from longctx.bench.prepared import Prepared
from longctx.bench.records import Row, Status
from longctx.bench.timing import Clock, in_turns, spread_of
from longctx.bench.workloads import WORKLOADS, Inputs
from longctx.errors import LongctxError, UnsupportedError

__all__ = ["DeviceLostError", "Session"]


class DeviceLostError(LongctxError, RuntimeError):
    """A contestant broke the GPU's context: nothing after it could be believed."""


@dataclass(frozen=True)
class _Failure:
    """Why a contestant has no figures."""

    status: str
    note: str
    verdict: Verdict | None = None


class Session:
    """Runs cases on one device.

    Parameters
    ----------
    contestants : sequence of Contestant
    device : torch.device
    clock : Clock
    ceilings : Ceilings
    seconds : float
        Time for each row.
    say : callable
        Told what is being done.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        device: torch.device,
        *,
        clock: Clock,
        ceilings: Ceilings,
        seconds: float,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._contestants = contestants
        self._device = device
        self._clock = clock
        self._ceilings = ceilings
        self._seconds = seconds
        self._say = say
        self._small: dict[Case, tuple[Inputs, list[Expectation]]] = {}
        self._small_outcomes: dict[tuple[str, Case], _Failure | None] = {}

    def run(self, case: Case) -> list[Row]:
        """Return one row for every contestant that knows the op, in the contestants' order.

        Raises
        ------
        DeviceLostError
            If a contestant left the GPU unusable.
        """
        with torch.no_grad():
            entrants = [c for c in self._contestants if _knows(c, case)]
            outcomes: dict[str, _Failure | Verdict] = {}
            able: list[Contestant] = []
            for contestant in entrants:
                failure = self._small_failure(contestant, case)
                if failure is None:
                    able.append(contestant)
                else:
                    outcomes[contestant.name] = failure
            times, host = self._timed(case, able, outcomes) if able else ({}, {})
            self._free()
        return [self._row(case, c, outcomes[c.name], times, host) for c in entrants]

    def _small_failure(self, contestant: Contestant, case: Case) -> _Failure | None:
        """Return why a contestant is refused or wrong at the case's small shape; checked once."""
        refusal = contestant.refuses(case, self._device)
        if refusal is not None:
            return _Failure(Status.REFUSED, refusal)
        small = WORKLOADS[case.op].reduced(case)
        key = contestant.name, replace(small, grid="")
        if key not in self._small_outcomes:
            self._say(f"{case.op} {small.name}: checking {contestant.name}")
            workload = WORKLOADS[case.op]
            if key[1] not in self._small:
                inputs = workload.inputs(small, self._device)
                self._small[key[1]] = inputs, workload.whole(small, inputs)
            inputs, expectations = self._small[key[1]]
            outcome = self._checked(contestant, small, inputs, expectations, bound=False)
            self._small_outcomes[key] = outcome[0] if isinstance(outcome[0], _Failure) else None
        return self._small_outcomes[key]

    def _checked(
        self,
        contestant: Contestant,
        case: Case,
        inputs: Inputs,
        expectations: Sequence[Expectation],
        *,
        bound: bool,
    ) -> tuple[_Failure | Verdict, Prepared | None]:
        """Run a contestant once and compare its result."""
        failure: _Failure | None = None
        try:
            prepared = contestant.prepare(case, inputs, bound=bound)
            verdict = judge(prepared.outputs(prepared()), expectations)
        except Exception as error:  # one contestant's failure is its own row's note
            failure = _failure_of(error)
        if failure is not None:
            self._survives(contestant.name, case, failure)
            return failure, None
        if verdict.right:
            return verdict, prepared
        note = (
            f"max error {verdict.error:.1e}, allowed {verdict.allowed:.1e} "
            f"({verdict.what}; {case.name})"
        )
        return _Failure(Status.WRONG, note, verdict), None

    def _timed(
        self, case: Case, able: Sequence[Contestant], outcomes: dict[str, _Failure | Verdict]
    ) -> tuple[dict[str, list[float]], dict[str, float | None]]:
        """Return rounds, and the host's time, of those that are right; enter all outcomes."""
        workload = WORKLOADS[case.op]
        self._say(f"{case.op} {case.name}: making inputs and exact rows")
        failure: _Failure | None = None
        try:
            inputs = workload.inputs(case, self._device)
            expectations = workload.sample(case, inputs)
        except Exception as error:  # such as inputs that do not fit
            failure = _failure_of(error)
        if failure is not None:
            self._survives("making the inputs", case, failure)
            outcomes.update({c.name: failure for c in able})
            return {}, {}
        ready: dict[str, Prepared] = {}
        for contestant in able:
            self._say(f"{case.op} {case.name}: checking {contestant.name}")
            outcome, prepared = self._checked(contestant, case, inputs, expectations, bound=True)
            outcomes[contestant.name] = outcome
            if prepared is not None:
                ready[contestant.name] = prepared

        def failed(name: str, error: Exception) -> None:
            found = _failure_of(error)
            outcomes[name] = found
            self._survives(name, case, found)

        self._say(f"{case.op} {case.name}: timing {', '.join(ready)}")
        times = in_turns(ready, self._clock, seconds=self._seconds, failed=failed)
        host: dict[str, float | None] = {}
        for name, taken in times.items():
            with ready[name].setting():
                host[name] = self._clock.host_seconds(ready[name].run, statistics.median(taken))
        return times, host

    def _row(
        self,
        case: Case,
        contestant: Contestant,
        outcome: _Failure | Verdict,
        times: dict[str, list[float]],
        host: dict[str, float | None],
    ) -> Row:
        work = work_of(case)
        failure = outcome if isinstance(outcome, _Failure) else None
        verdict = outcome.verdict if isinstance(outcome, _Failure) else outcome
        row = Row(
            op=case.op,
            case=case.name,
            grid=case.grid,
            contestant=contestant.name,
            kind=contestant.kind,
            status=failure.status if failure else Status.OK,
            note=failure.note if failure else "",
            shape=case.as_dict(),
            gflop=work.flops / 1e9,
            gbytes=work.bytes / 1e9,
            error=verdict.error if verdict else None,
            allowed=verdict.allowed if verdict else None,
        )
        if failure is not None:
            return row
        own = times[contestant.name]
        spread = spread_of(own)
        on_host = host[contestant.name]
        floor = self._ceilings.floor(work, case.dtype)
        ratios = {
            name: statistics.median(b / a for a, b in zip(own, other, strict=False))
            for name, other in times.items()
            if name != contestant.name
        }
        return replace(
            row,
            ms=spread.median * 1e3,
            ms_low=spread.low * 1e3,
            ms_high=spread.high * 1e3,
            rounds=spread.rounds,
            tflops=work.flops / spread.median / 1e12 if work.flops else None,
            tbs=work.bytes / spread.median / 1e12,
            fraction=floor.seconds / spread.median,
            bound=floor.bound,
            host_us=None if on_host is None else on_host * 1e6,
            ratios=ratios,
        )

    def _survives(self, name: str, case: Case, failure: _Failure) -> None:
        """Free what a failed call held, and stop if the GPU's context went with it."""
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._free()
        except Exception as error:
            raise DeviceLostError(
                f"{name} broke the GPU's context at {case.op} {case.name} ({failure.note}): rows "
                "up to here are kept; leave it out or mend it, and run the rest again"
            ) from error

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _knows(contestant: Contestant, case: Case) -> bool:
    return not isinstance(contestant, PeerContestant) or case.op in contestant.peer.ops


def _failure_of(error: Exception) -> _Failure:
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if _is_out_of_memory(error):
        return _Failure(Status.OUT_OF_MEMORY, first)
    if isinstance(error, UnsupportedError):
        return _Failure(Status.REFUSED, first)
    return _Failure(Status.FAILED, f"{type(error).__name__}: {first}")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # the CPU allocator, and other libraries' allocators, have types of their own
    return "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error)
