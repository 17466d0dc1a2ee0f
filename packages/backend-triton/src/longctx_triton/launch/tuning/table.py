"""The file that holds tuned tiles: its format, reading it, writing it so that nobody sees half."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "FORMAT",
    "Entry",
    "Key",
    "Table",
    "TableError",
    "Value",
    "key_of",
    "read_table",
    "store",
]

FORMAT = 1
"""Raised when older readers would misread the file."""

Value = int | str
"""Booleans, too: they are integers."""

Key = tuple[str, frozenset[tuple[str, Value]], frozenset[tuple[str, Value]]]
"""Kernel, facts and the code's own tiles."""


class TableError(ValueError):
    """A file is no table that can be used here; the message says why, without the file's name."""


@dataclass(frozen=True)
class Entry:
    """Tiles that were faster than the code's own in one situation.

    Attributes
    ----------
    kernel : str
        Name of the choice, such as ``"flash_forward"``.
    facts : mapping of str to int or str
        What the choice depends on, besides the GPU: head size, kinds of features.
    default : mapping of str to int or str
        The code's own tiles there. Where the code has changed its mind since, the entry is not
        used: it was not compared with the new choice.
    tiles : mapping of str to int or str
        What to use instead; the same fields.
    case : str
        What was timed.
    default_ms, tuned_ms : float
        Medians of the two, in the same run.
    """

    kernel: str
    facts: Mapping[str, Value]
    default: Mapping[str, Value]
    tiles: Mapping[str, Value]
    case: str = ""
    default_ms: float = 0.0
    tuned_ms: float = 0.0

    @property
    def key(self) -> Key:
        """What the entry is found by."""
        return key_of(self.kernel, self.facts, self.default)


@dataclass(frozen=True)
class Table:
    """Entries for one GPU and one version of Triton.

    Attributes
    ----------
    gpu : str
        Its name, as the driver gives it.
    triton : str
        Major and minor version: another compiler makes other code of the same tiles.
    entries : mapping of Key to Entry
    """

    gpu: str
    triton: str
    entries: Mapping[Key, Entry]


def key_of(kernel: str, facts: Mapping[str, Value], default: Mapping[str, Value]) -> Key:
    """Return what an entry is found by."""
    return kernel, frozenset(facts.items()), frozenset(default.items())


def read_table(path: Path) -> Table:
    """Read a file.

    Raises
    ------
    FileNotFoundError
    TableError
        If it cannot be read or holds anything but a table of this format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TableError(error.strerror or str(error)) from error
    except ValueError as error:
        raise TableError(f"not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise TableError("not a table of tuned tiles")
    if content.get("format") != FORMAT:
        raise TableError(f"format {content.get('format')!r}, this version reads {FORMAT}")
    if not all(isinstance(content.get(name), str) for name in ("gpu", "triton")):
        raise TableError("the GPU or the version of Triton is missing")
    entries = [_entry(item) for item in content["entries"]]
    return Table(content["gpu"], content["triton"], {entry.key: entry for entry in entries})


def store(path: Path, gpu: str, triton: str, measured: Mapping[Key, Entry | None]) -> None:
    """Put entries into a file, keep its others, and remove those that are None.

    The file is replaced as a whole, under a lock: readers see the old or the new one, and two
    processes that tune at once lose nothing of each other's. What is no table for this GPU and
    version of Triton is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        entries: dict[Key, Entry] = {}
        with suppress(FileNotFoundError, TableError):
            table = read_table(path)
            if (table.gpu, table.triton) == (gpu, triton):
                entries.update(table.entries)
        for key, entry in measured.items():
            entries.pop(key, None)
            if entry is not None:
                entries[key] = entry
        _replace(path, _text(gpu, triton, entries))


def _entry(item: Any) -> Entry:
    if not isinstance(item, dict) or not isinstance(item.get("kernel"), str):
        raise TableError("an entry names no kernel")
    kernel = item["kernel"]
    for part in ("facts", "default", "tiles"):
        values = item.get(part)
        if not isinstance(values, dict) or not all(
            isinstance(value, Value) for value in values.values()
        ):
            raise TableError(f"{part} of an entry of {kernel} are no names with values")
    default, tiles = item["default"], item["tiles"]
    if {name: type(value) for name, value in default.items()} != {
        name: type(value) for name, value in tiles.items()
    }:
        raise TableError(f"tiles of an entry of {kernel} have other fields than its default")
    if any(type(value) is int and value < 0 for value in tiles.values()):
        raise TableError(f"tiles of an entry of {kernel} are negative")
    times = {name: item.get(name, 0.0) for name in ("default_ms", "tuned_ms")}
    case = item.get("case", "")
    if not isinstance(case, str) or not all(isinstance(t, int | float) for t in times.values()):
        raise TableError(f"case or times of an entry of {kernel} are of a wrong type")
    return Entry(kernel, item["facts"], default, tiles, case, **times)


def _text(gpu: str, triton: str, entries: Mapping[Key, Entry]) -> str:
    """Return the file: one line an entry, in a fixed order, for readable differences."""
    ordered = sorted(
        entries.values(), key=lambda e: (e.kernel, sorted(e.facts.items()), str(e.default))
    )
    lines = ",".join(f"\n    {json.dumps(asdict(entry))}" for entry in ordered)
    head = f'"format": {FORMAT},\n  "gpu": {json.dumps(gpu)},\n  "triton": {json.dumps(triton)}'
    return f'{{\n  {head},\n  "entries": [{lines}\n  ]\n}}\n'


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", text=True)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a file system without locks only loses the merging."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
