"""``longctx tune``: kernels to trials, outcomes to a terminal and into a table."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Rows

from longctx.bench.tables import plain_console
from longctx.errors import nearest_name
from longctx_triton import plugin
from longctx_triton.launch.tuning import (
    Entry,
    Question,
    TableError,
    read_table,
    shipped_table,
    store,
    triton_version,
    user_table,
)
from longctx_triton.tune.candidates import MOVES
from longctx_triton.tune.session import Attempt, Outcome, run_trials

__all__ = ["list_tables", "run_tune"]


class Step(Protocol):
    """Shows what is being done, and how many trials were finished."""

    def __call__(self, text: str, done: int | None = None) -> None:
        """Show it."""
        ...


SECONDS = 0.15
"""Default time for each call that is timed."""


def run_tune(
    kernels: Sequence[str],
    console: Console,
    *,
    seconds: float = SECONDS,
    json: Path | None = None,
    output: Path | None = None,
) -> list[Outcome]:
    """Tune, store what was faster after every trial, and print a table at the end.

    Parameters
    ----------
    kernels : sequence of str
        Names of choices; all when empty.
    console : Console
    seconds : float
    json : Path, optional
        File for every attempt, one JSON line a trial.
    output : Path, optional
        Table to write instead of the user's.

    Returns
    -------
    list of Outcome

    Raises
    ------
    ValueError, RuntimeError
        If nothing can be tuned here; one sentence.
    """
    for kernel in kernels:
        if kernel not in MOVES:
            raise ValueError(f"no kernel is called {kernel!r}: {nearest_name(kernel, MOVES)}")
    if not seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {seconds:g}")
    device = _device()
    # kernels are imported where they can run
    from longctx_triton.tune.lab import Lab
    from longctx_triton.tune.trials import TRIALS

    gpu = torch.cuda.get_device_name(device)
    path = user_table(gpu) if output is None else output
    shipped = _shipped(gpu) if output is None else {}
    trials = [trial for trial in TRIALS if not kernels or trial.kernel in kernels]
    try:  # before the time is spent
        store(path, gpu, triton_version(), {})
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    outcomes: list[Outcome] = []
    console = plain_console(console)
    console.print(
        f"{escape(gpu)}, Triton {triton_version()}: {len(trials)} trials", highlight=False
    )
    try:
        with torch.no_grad(), _lines(json) as line, _progress(len(trials)) as step:
            lab = Lab(device, seconds)
            for outcome in run_trials(trials, lab, _known(shipped), step):
                outcomes.append(outcome)
                _keep(outcome, path, gpu, shipped)
                line(_as_json(outcome))
                step("", 1 + trials.index(outcome.trial))
    finally:  # stopped by hand: what is done stays
        if outcomes:
            console.print(_summary(outcomes), highlight=False)
            console.print(f"tuned tiles: {escape(str(path))}", highlight=False)
    return outcomes


def list_tables(console: Console) -> None:
    """Print what can be tuned and, with a GPU, which tables are in use."""
    console = plain_console(console)
    console.print(f"kernels: {', '.join(MOVES)}", highlight=False)
    missing = plugin.missing()
    if missing:
        why = "; ".join(reason.message for reason in missing)
        console.print(f"no table is in use: {escape(why)}", highlight=False)
        return
    gpu = torch.cuda.get_device_name()
    console.print(f"{escape(gpu)}, Triton {triton_version()}", highlight=False)
    places = {"yours": user_table(gpu), "the package's": shipped_table(gpu)}
    for whose, path in places.items():
        state = "none" if path is None else f"{_state(path)}, {path}"
        console.print(f"{whose}: {escape(state)}", highlight=False)


def _state(path: Path) -> str:
    try:
        table = read_table(path)
    except FileNotFoundError:
        return "none yet"
    except TableError as error:
        return f"not used: {error}"
    if table.triton != triton_version():
        return f"not used: made with Triton {table.triton}"
    return f"{len(table.entries)} entries"


def _device() -> torch.device:
    missing = plugin.missing()
    if missing:
        why = "; ".join(reason.message for reason in missing)
        raise RuntimeError(f"tuning needs a GPU that the Triton backend runs on: {why}")
    if plugin.interpreting():
        raise RuntimeError("tuning needs a GPU: unset TRITON_INTERPRET")
    return torch.device("cuda", torch.cuda.current_device())


def _shipped(gpu: str) -> dict[Any, Entry]:
    """Return the package's entries for a GPU."""
    path = shipped_table(gpu)
    if path is None:
        return {}
    try:
        table = read_table(path)
    except TableError:  # the first lookup says so
        return {}
    return dict(table.entries) if table.triton == triton_version() else {}


def _known(shipped: dict[Any, Entry]) -> Callable[[Question], list[Any]]:
    return lambda question: [shipped[question.key].tiles] if question.key in shipped else []


def _keep(outcome: Outcome, path: Path, gpu: str, shipped: dict[Any, Entry]) -> None:
    """Store the best tiles where another table, or the code, would answer otherwise."""
    entry = outcome.entry()
    if entry is None:
        return
    otherwise = shipped.get(entry.key)
    same = entry.tiles == (entry.default if otherwise is None else otherwise.tiles)
    store(path, gpu, triton_version(), {entry.key: None if same else entry})


def _summary(outcomes: Sequence[Outcome]) -> Rows:
    rows = Rows()
    for column in ("kernel", "case", "default ms", "best ms", "ratio", "tiles"):
        rows.add_column(column, overflow="fold")
    for outcome in outcomes:
        first = (outcome.trial.kernel, outcome.trial.case)
        spread = outcome.default.spread
        if spread is None:
            rows.add_row(*first, "", "", "", escape(outcome.note))
            continue
        best = outcome.winner or outcome.default
        assert best.spread is not None
        ratio = spread.median / best.spread.median
        changed = [f"{n}={v}" for n, v in best.tiles.items() if v != outcome.default.tiles[n]]
        times = (f"{s.median * 1e3:.4g}" for s in (spread, best.spread))
        rows.add_row(*first, *times, f"{ratio:.3f}", " ".join(changed))
    return rows


def _as_json(outcome: Outcome) -> dict[str, Any]:
    def attempt(tried: Attempt) -> dict[str, Any]:
        times = None if tried.spread is None else asdict(tried.spread)
        return {"tiles": dict(tried.tiles), "note": tried.note, "seconds": times}

    return {
        "kernel": outcome.trial.kernel,
        "case": outcome.trial.case,
        "facts": {} if outcome.question is None else dict(outcome.question.facts),
        "note": outcome.note,
        "default": attempt(outcome.default),
        "others": [attempt(tried) for tried in outcome.others],
        "winner": None if outcome.winner is None else dict(outcome.winner.tiles),
    }


@contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    if path is None:
        yield lambda _row: None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    with file:
        yield lambda row: print(json_format.dumps(row), file=file, flush=True)


@contextmanager
def _progress(total: int) -> Iterator[Step]:
    """Show a bar on a terminal; say nothing elsewhere."""
    console = Console(stderr=True)
    bar = Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)

        def step(text: str, done: int | None = None) -> None:
            bar.update(task, completed=done, description=escape(text) if text else None)

        yield step
