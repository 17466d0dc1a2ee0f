"""One choice of tiles after the other: compile candidates, compare them, time them in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.bench.timing import Spread
from longctx_triton.launch.tuning import Entry, Question, Value, asked, forced
from longctx_triton.tune.candidates import MOVES, Built, neighbours, unfit

__all__ = ["Attempt", "Bench", "Call", "Outcome", "Trial", "run_trials"]

Call = Callable[[], Sequence[Tensor]]
"""A primitive with its inputs; returns its results."""

AT_ONCE = 8
"""Trials whose candidates are compiled together: enough to fill the processor."""

OWN = "default"


@dataclass(frozen=True)
class Trial:
    """A call that shows which tiles suit a kernel.

    Attributes
    ----------
    kernel : str
        Name of the choice.
    case : str
        The call in words.
    calls : callable
        ``device -> [call, ...]``: the first is timed; tiles are kept only if the others, which
        share the choice, compile with them too.
    """

    kernel: str
    case: str
    calls: Callable[[torch.device], Sequence[Call]]


@dataclass
class Attempt:
    """Tiles that were tried.

    Attributes
    ----------
    tiles : mapping of str to int or str
    note : str
        Why they were not timed; empty if they were.
    spread : Spread or None
        Seconds.
    """

    tiles: Mapping[str, Value]
    note: str = ""
    spread: Spread | None = None


@dataclass
class Outcome:
    """What a trial showed.

    Attributes
    ----------
    trial : Trial
    question : Question or None
        The choice in question; None where the call does not ask for it on this GPU.
    default : Attempt
        The code's own tiles.
    others : list of Attempt
    winner : Attempt or None
        The fastest, if it beats the code's own by more than their spread.
    note : str
        Why there is no result.
    """

    trial: Trial
    question: Question | None = None
    default: Attempt = field(default_factory=lambda: Attempt({}))
    others: list[Attempt] = field(default_factory=list)
    winner: Attempt | None = None
    note: str = ""

    def entry(self) -> Entry | None:
        """Return the best tiles as an entry, the code's own if none was faster; None untimed."""
        if self.question is None or self.default.spread is None:
            return None
        best = self.winner or self.default
        assert best.spread is not None
        return Entry(
            self.trial.kernel,
            self.question.facts,
            self.default.tiles,
            best.tiles,
            self.trial.case,
            round(self.default.spread.median * 1e3, 4),
            round(best.spread.median * 1e3, 4),
        )


class Compiling(Protocol):
    """What compiles calls at once."""

    def begin(self, call: Call) -> Any:
        """Start compiling what a call launches."""
        ...

    def finish(self, begun: Any) -> list[Built]:
        """Wait for it; raises if it does not compile or fit."""
        ...


class Bench(Protocol):
    """What a session needs of a GPU; see `longctx_triton.tune.lab.Lab`."""

    device: torch.device

    def compiler(self) -> AbstractContextManager[Compiling]:
        """Return a compiler to enter."""
        ...

    def ready(self, call: Call) -> tuple[Callable[[], Any], Any]:
        """Run a call; return what to time and the results."""
        ...

    def differ(self, results: Any, expected: Any) -> str:
        """Return how results differ; empty if they do not."""
        ...

    def time(self, calls: Mapping[str, Callable[[], Any]], share: float) -> dict[str, Spread]:
        """Time calls in turns, each for a share of its time."""
        ...


Known = Callable[[Question], Sequence[Mapping[str, Value]]]
"""Further tiles to try for a question, such as those of another table."""


def run_trials(
    trials: Sequence[Trial], bench: Bench, known: Known, say: Callable[[str], None]
) -> Iterator[Outcome]:
    """Yield the outcomes of some trials after the other.

    When it is interrupted, it yields what is done before it raises.

    Parameters
    ----------
    trials : sequence of Trial
    bench : Bench
    known : callable
    say : callable
        Told what is being done.
    """
    for start in range(0, len(trials), AT_ONCE):
        together = trials[start : start + AT_ONCE]
        say(f"compiling {', '.join(dict.fromkeys(trial.kernel for trial in together))}")
        done: list[Outcome] = []
        stopped: KeyboardInterrupt | None = None
        try:
            for outcome in _compiled(together, bench, known):
                if not outcome.note:
                    say(f"timing {outcome.trial.kernel}: {outcome.trial.case}")
                    _try_to_time(outcome, bench)
                done.append(outcome)
        except KeyboardInterrupt as error:
            stopped = error
        say("compiling the winners' other calls")
        _prove([outcome for outcome in done if outcome.winner is not None], bench)
        yield from done
        if stopped is not None:
            raise stopped


def _compiled(trials: Sequence[Trial], bench: Bench, known: Known) -> list[Outcome]:
    """Return the trials' outcomes with notes at the candidates that need not be timed."""
    outcomes: list[Outcome] = []
    with bench.compiler() as compiler:
        begun = []
        for trial in trials:
            try:
                call = trial.calls(bench.device)[0]
                with asked() as questions:
                    compiler.begin(call)
            except Exception as error:
                outcomes.append(Outcome(trial, note=_first_line(error)))
                continue
            own = [question for question in questions.values() if question.kernel == trial.kernel]
            if not own:
                outcomes.append(Outcome(trial, note="is not launched here on this GPU"))
            for question in own:
                outcome = _outcome(trial, question, known(question))
                outcomes.append(outcome)
                for attempt in (outcome.default, *outcome.others):
                    begun.append((outcome, attempt, _begun(call, question, attempt, compiler)))
        found: dict[int, list[Built]] = {}
        for outcome, attempt, kernels in begun:
            built = _finished(attempt, kernels, compiler)
            if attempt is outcome.default:
                found[id(outcome)] = built
                outcome.note = attempt.note
            attempt.note = attempt.note or unfit(built, found[id(outcome)])
    return outcomes


def _outcome(trial: Trial, question: Question, known: Sequence[Mapping[str, Value]]) -> Outcome:
    own = question.default._asdict()
    tried = [*neighbours(question.default, MOVES[trial.kernel]), *known]
    others = [
        Attempt(tiles)
        for place, tiles in enumerate(tried)
        if tiles != own and tiles not in tried[:place]
    ]
    return Outcome(trial, question, Attempt(own), others)


def _begun(call: Call, question: Question, attempt: Attempt, compiler: Compiling) -> Any:
    """Start compiling a call with some tiles; a failure is noted, and nothing is begun."""
    try:
        with forced(question.key, attempt.tiles):
            return compiler.begin(call)
    except Exception as error:  # tiles may be anything
        attempt.note = _first_line(error)
        return None


def _finished(attempt: Attempt, begun: Any, compiler: Compiling) -> list[Built]:
    if begun is None:
        return []
    try:
        return compiler.finish(begun)
    except Exception as error:
        attempt.note = _first_line(error)
        return []


def _try_to_time(outcome: Outcome, bench: Bench) -> None:
    try:
        _time(outcome, bench)
    except Exception as error:  # one trial's failure is its own line
        outcome.note = _first_line(error)
    gc.collect()  # graphs hold their results' memory


def _time(outcome: Outcome, bench: Bench) -> None:
    """Run, compare and time what compiled; enter spreads and the winner."""
    assert outcome.question is not None
    call, key = outcome.trial.calls(bench.device)[0], outcome.question.key
    with forced(key, outcome.default.tiles):
        run, expected = bench.ready(call)
    default, runs, attempts = outcome.default, {OWN: run}, {OWN: outcome.default}
    for place, attempt in enumerate(outcome.others):
        if attempt.note:
            continue
        try:
            with forced(key, attempt.tiles):
                run, results = bench.ready(call)
            attempt.note = bench.differ(results, expected)
        except Exception as error:  # such as too many resources at launch
            attempt.note = _first_line(error)
        if not attempt.note:
            runs[str(place)], attempts[str(place)] = run, attempt
    for name, spread in bench.time(runs, 1.0).items():
        attempts[name].spread = spread
    best = min(attempts, key=lambda name: _timed(attempts[name]).median)
    if not _beats(attempts[best], default):
        return
    # the best of many is partly luck: the two once more, for longer
    for name, spread in bench.time({name: runs[name] for name in (OWN, best)}, 2.0).items():
        attempts[name].spread = spread
    if _beats(attempts[best], default):
        outcome.winner = attempts[best]


def _prove(outcomes: Sequence[Outcome], bench: Bench) -> None:
    """Drop winners with which the other calls that share the choice do not compile."""
    with bench.compiler() as compiler:
        begun = []
        for outcome in outcomes:
            assert outcome.question is not None
            assert outcome.winner is not None
            for call in outcome.trial.calls(bench.device)[1:]:
                for attempt in (outcome.winner, outcome.default):
                    trial = Attempt(attempt.tiles)
                    kernels = _begun(call, outcome.question, trial, compiler)
                    begun.append((outcome, trial, kernels))
        pairs = iter([(o, t, _finished(t, kernels, compiler)) for o, t, kernels in begun])
        for (outcome, trial, built), (_, _, own) in zip(pairs, pairs, strict=True):
            note = trial.note or unfit(built, own)
            if note and outcome.winner is not None:
                outcome.winner.note = f"in another call: {note}"
                outcome.winner = None


def _beats(attempt: Attempt, other: Attempt) -> bool:
    """Return whether its slow rounds are faster than the quick ones of the other."""
    return _timed(attempt).high < _timed(other).low


def _timed(attempt: Attempt) -> Spread:
    assert attempt.spread is not None
    return attempt.spread


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
