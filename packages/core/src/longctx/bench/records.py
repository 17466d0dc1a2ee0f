"""Results as JSON lines: one header, then one line a row, each written as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

__all__ = ["FORMAT", "Recording", "Row", "RowWriter", "Status", "read_recording"]

FORMAT = 1
"""Version of the lines; a file of another version is not read."""


class Status:
    """How a row ended: a closed set of words."""

    OK = "ok"
    WRONG = "wrong"
    OUT_OF_MEMORY = "out of memory"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True)
class Row:
    """One contestant at one case.

    Attributes
    ----------
    op, case, grid : str
    contestant : str
    kind : {"backend", "peer"}
    status : str
        A word of `Status`; only ``"ok"`` rows have figures.
    note : str
        Why there are no figures, in one sentence.
    shape : dict
        The case as `longctx.bench.case.Case.as_dict` gives it.
    ms, ms_low, ms_high : float or None
        Median, 20 % and 80 % quantile.
    rounds : int
    tflops, tbs : float or None
        Achieved, by the work that `longctx.bench.counting` counts.
    gflop, gbytes : float
        That work.
    fraction : float or None
        Least time / median time: the share of the ceiling that binds.
    bound : str
        That ceiling, ``"compute"`` or ``"memory"``.
    ratios : dict of str to float
        Other contestant's time / this one's, paired by round: above 1 this one is faster.
    host_us : float or None
        Microseconds that a call costs the host of a GPU: the least of runs of calls in a row.
    error, allowed : float or None
        Largest error found, and what the data allow, relative to each row's maximum.
    """

    op: str
    case: str
    grid: str
    contestant: str
    kind: str
    status: str
    note: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    rounds: int = 0
    tflops: float | None = None
    tbs: float | None = None
    gflop: float = 0.0
    gbytes: float = 0.0
    fraction: float | None = None
    bound: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    host_us: float | None = None
    error: float | None = None
    allowed: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What two recordings are compared by: op, case, contestant."""
        return self.op, self.case, self.contestant

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a JSON line's object; infinities become text."""
        values = {"record": "row", **asdict(self)}
        return {k: str(v) if v in (float("inf"), -float("inf")) else v for k, v in values.items()}


@dataclass(frozen=True)
class Recording:
    """A file of results.

    Attributes
    ----------
    path : Path
    header : mapping
        Machine, versions, command and ceilings.
    rows : tuple of Row
    """

    path: Path
    header: Mapping[str, Any]
    rows: tuple[Row, ...]


class RowWriter:
    """Writes a recording line by line; what an interrupted run had measured stays in the file.

    Parameters
    ----------
    path : Path
        Replaced if it exists; missing folders are made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def header(self, header: Mapping[str, Any]) -> None:
        """Write the first line."""
        self._line({"record": "header", "format": FORMAT, **header})

    def rows(self, rows: Iterable[Row]) -> None:
        """Write some rows."""
        for row in rows:
            self._line(row.as_dict())

    def _line(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()


def read_recording(path: Path) -> Recording:
    """Read what `RowWriter` wrote; a last line that was cut off is left out.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ValueError
        If the file cannot be read or is no recording; one sentence.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(f"cannot read {path}: {reason}") from error
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and objects:
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error.msg}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number} is no object of a recording")
        objects.append(value)
    if not objects or objects[0].pop("record", None) != "header":
        raise ValueError(f"{path} is no recording of longctx bench: its first line is no header")
    header = objects[0]
    if header.pop("format", None) != FORMAT:
        raise ValueError(f"{path} was written in another format: this longctx reads {FORMAT}")
    return Recording(path, header, tuple(_row(path, n, v) for n, v in enumerate(objects[1:], 2)))


def _row(path: Path, number: int, values: dict[str, Any]) -> Row:
    if values.pop("record", None) != "row":
        raise ValueError(f"{path}, line {number} is no row")
    for name in ("error", "allowed"):
        if isinstance(values.get(name), str):
            values[name] = float(values[name])
    try:
        return Row(**values)
    except TypeError as error:
        raise ValueError(f"{path}, line {number} is no row: {error}") from error
