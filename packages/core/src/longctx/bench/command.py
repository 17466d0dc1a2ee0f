"""``longctx bench``: options to cases, cases to rows, rows to a terminal, a file and pictures."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longctx.bench.case import Case
from longctx.bench.ceilings import measure_ceilings
from longctx.bench.comparison import compare_recordings, comparison_table
from longctx.bench.contestants import Roster, find_contestants
from longctx.bench.machine import describe_machine
from longctx.bench.plots import draw, require_matplotlib
from longctx.bench.records import Recording, Row, RowWriter, read_recording
from longctx.bench.session import Session
from longctx.bench.shapes import calls, standard_cases
from longctx.bench.tables import (
    case_heading,
    case_table,
    ceilings_line,
    list_table,
    plain_console,
)
from longctx.bench.timing import Clock
from longctx.errors import nearest_name
from longctx.protocols.families import OPS
from longctx.support import DTYPES

__all__ = ["Request", "compare_files", "list_shapes", "plot_file", "run_bench"]

Step = Callable[[str, int], None]
"""Told what is being done, and how many cases were finished."""

SECONDS = {"cuda": 1.0, "cpu": 0.2}
"""Default time for each row, by device."""

INPUT_DTYPES = tuple(name for name in DTYPES if name not in ("fp64", "fp8_e4m3"))


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes
    ----------
    ops : tuple of str
        Public op names; all of them when empty.
    shapes : str
        Words that a case's name or grid must have, as `standard_cases` takes them.
    device : str or None
        ``"cpu"`` or ``"cuda"``; a GPU if there is one when None.
    dtype : str or None
        Replaces the shapes' own data type.
    backward : bool
    backends, peers : tuple of str
        Names to restrict to.
    seconds : float or None
        Time for each row.
    """

    ops: tuple[str, ...] = ()
    shapes: str = ""
    device: str | None = None
    dtype: str | None = None
    backward: bool = False
    backends: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    seconds: float | None = None

    def command(self) -> str:
        """Return the command line that asks for this."""
        words = ["longctx", "bench", *(self.ops or ("--all",))]
        for option, value in (
            ("--shapes", self.shapes),
            ("--device", self.device),
            ("--dtype", self.dtype),
            ("--seconds", None if self.seconds is None else f"{self.seconds:g}"),
        ):
            words += [option, value] if value else []
        words += ["--backward"] if self.backward else []
        for option, names in (("--backend", self.backends), ("--peer", self.peers)):
            for name in names:
                words += [option, name]
        return shlex.join(words)

    def resolved_device(self, *, listing: bool = False) -> torch.device:
        """Return the device; a list of shapes needs none to exist."""
        gpu = torch.cuda.is_available()
        name = self.device or ("cuda" if gpu else "cpu")
        if name not in SECONDS:
            raise ValueError(f"--device must be cpu or cuda, got {name!r}")
        if name == "cuda" and not gpu and not listing:
            raise ValueError(
                "--device cuda needs a GPU that this torch can use: see longctx doctor"
            )
        return torch.device(name)

    def cases(self, device: torch.device) -> list[Case]:
        """Return the cases asked for; raise in one sentence if there are none."""
        if self.dtype is not None and self.dtype not in INPUT_DTYPES:
            hint = nearest_name(self.dtype, INPUT_DTYPES)
            raise ValueError(f"no input dtype is called {self.dtype!r}: {hint}")
        ops = self.ops or tuple(OPS)
        found = standard_cases(
            ops,
            device=device.type,
            backward=self.backward,
            dtype=self.dtype,
            shapes=self.shapes,
        )
        if found:
            return found
        if self.shapes and standard_cases(ops, device=device.type, backward=self.backward):
            raise ValueError(
                f"no shape matches {self.shapes!r}: give words of a shape's name or its grid, as "
                "longctx bench --list shows them"
            )
        way = "backward" if self.backward else "forward"
        raise ValueError(f"there is no {way} shape of {', '.join(ops)}: see longctx bench --list")


def list_shapes(request: Request, console: Console) -> None:
    """Print the shapes that a request would run, and how to ask for those it would not."""
    console = plain_console(console)
    console.print(list_table(request.cases(request.resolved_device(listing=True))))
    if not request.shapes and not request.backward:
        hint = f"small shapes for the host's time of a call: --shapes {calls.GRID}"
        console.print(hint, highlight=False)


def run_bench(
    request: Request, console: Console, *, json: Path | None = None, plot: Path | None = None
) -> list[Row]:
    """Measure, print case by case, record and draw.

    Parameters
    ----------
    request : Request
    console : Console
        Where tables go.
    json : Path, optional
        File for the JSON lines.
    plot : Path, optional
        Folder for pictures.

    Returns
    -------
    list of Row

    Raises
    ------
    ValueError, LongctxError, ImportError
        If the request cannot be met; one sentence.
    """
    if plot is not None:
        require_matplotlib()
    if request.seconds is not None and not request.seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {request.seconds:g}")
    device = request.resolved_device()
    cases = request.cases(device)
    ops = list(dict.fromkeys(case.op for case in cases))
    roster = find_contestants(ops, device, backends=request.backends, peers=request.peers)
    if not roster.contestants:
        why = "; ".join(f"{name}: {reason}" for name, reason in roster.left_out.items())
        raise ValueError(f"nobody is left to measure: {why}")
    console = plain_console(console)
    rows: list[Row] = []
    with _recording(json) as writer, _progress(len(cases)) as step:
        clock = Clock(device)
        step("measuring the ceilings", 0)
        ceilings = measure_ceilings(device, (case.dtype for case in cases), clock)
        header = {
            **describe_machine(device),
            "command": request.command(),
            "ceilings": ceilings.as_dict(),
            "left_out": dict(roster.left_out),
        }
        if writer is not None:
            writer.header(header)
        _print_header(console, header, roster)
        session = Session(
            roster.contestants,
            device,
            clock=clock,
            ceilings=ceilings,
            seconds=request.seconds or SECONDS[device.type],
            say=lambda text: step(text, 0),
        )
        for case in cases:
            found = session.run(case)
            rows += found
            if writer is not None:
                writer.rows(found)
            console.print(case_heading(case), highlight=False)
            console.print(case_table(found), highlight=False)
            step("", 1)
    if plot is not None:
        _print_pictures(draw(Recording(json or Path(), header, tuple(rows)), plot), console)
    return rows


def _print_header(console: Console, header: dict[str, object], roster: Roster) -> None:
    versions = [f"torch {header['torch']}", f"longctx {header['longctx'] or 'from source'}"]
    versions += [f"triton {header['triton']}"] if header["triton"] else []
    console.print(f"{escape(str(header['device']))}: {', '.join(versions)}", highlight=False)
    ceilings = header["ceilings"]
    assert isinstance(ceilings, dict)
    console.print(f"ceilings in this run: {ceilings_line(ceilings)}", highlight=False)
    names: dict[str, list[str]] = {}
    for name, reason in roster.left_out.items():
        names.setdefault(reason, []).append(name)
    for reason, absent in names.items():
        text = f"left out: {', '.join(absent)}: {reason}"
        console.print(escape(text), highlight=False)


def _print_pictures(paths: Sequence[Path], console: Console) -> None:
    if not paths:
        console.print("no picture: no row has figures", highlight=False)
    for path in paths:
        console.print(f"picture: {escape(str(path))}", highlight=False)


@contextmanager
def _recording(path: Path | None) -> Iterator[RowWriter | None]:
    if path is None:
        yield None
        return
    try:
        writer = RowWriter(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    with writer:
        yield writer


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

        def step(text: str, done: int) -> None:
            bar.update(task, advance=done, description=escape(text) if text else None)

        yield step


def compare_files(first: Path, second: Path, console: Console) -> None:
    """Print the ratios of two recordings.

    Raises
    ------
    ValueError
        If a file cannot be read, or the two have no row in common; one sentence.
    """
    recordings = read_recording(first), read_recording(second)
    pairs = compare_recordings(*recordings)
    if not any(pair.first and pair.second for pair in pairs):
        raise ValueError(f"{first} and {second} have no row in common")
    console = plain_console(console)
    names = ("A", "B")
    for name, recording in zip(names, recordings, strict=True):
        header = recording.header
        about = [str(header.get(key)) for key in ("device", "torch", "date") if header.get(key)]
        commit = str(header.get("commit") or "")[:10]
        about += [f"commit {commit}"] if commit else []
        console.print(
            f"{name}: {escape(str(recording.path))} ({', '.join(about)})", highlight=False
        )
    if recordings[0].header.get("device") != recordings[1].header.get("device"):
        console.print("the two were recorded on different devices", style="yellow")
    console.print(comparison_table(pairs, names), highlight=False)


def plot_file(recorded: Path, folder: Path, console: Console) -> None:
    """Draw a recording that was made before."""
    require_matplotlib()
    _print_pictures(draw(read_recording(recorded), folder), plain_console(console))
