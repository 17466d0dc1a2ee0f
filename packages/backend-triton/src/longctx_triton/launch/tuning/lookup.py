"""The decorator that lets tables override a choice of tiles."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from longctx_triton.launch.device import current_gpu
from longctx_triton.launch.tuning.places import shipped_table, triton_version, user_table
from longctx_triton.launch.tuning.table import (
    Entry,
    Key,
    TableError,
    Value,
    key_of,
    read_table,
)

__all__ = ["Question", "asked", "forced", "tables", "tuned"]

Arguments = ParamSpec("Arguments")
Tiles = TypeVar("Tiles", bound=tuple[Any, ...])

THE_GPU = ("device", "arch")
"""Names of arguments that a table answers by being the GPU's."""

MOST_REMEMBERED = 4096
"""Answers of one choice; a length among its arguments must not fill the memory."""


@dataclass(frozen=True)
class Question:
    """What a choice was asked, and its own answer.

    Attributes
    ----------
    kernel : str
    facts : mapping of str to int or str
    default : NamedTuple
        The code's own tiles.
    """

    kernel: str
    facts: Mapping[str, Value]
    default: Any

    @property
    def key(self) -> Key:
        """What its answer is found by."""
        return key_of(self.kernel, self.facts, self.default._asdict())


_HERE = __name__.rpartition(".")[0]
_remembered: list[dict[Any, Any]] = []
_forced: dict[Key, Mapping[str, Value]] = {}
_listeners: list[dict[Key, Question]] = []


def tuned(
    kernel: str, *, apart: tuple[str, ...] = ()
) -> Callable[[Callable[Arguments, Tiles]], Callable[Arguments, Tiles]]:
    """Return a decorator for a function that chooses tiles, a NamedTuple of numbers.

    A table overrides what the function returns for these facts, its arguments: the user's table
    for the GPU that is current, then the package's. Answers are remembered, so that a later call
    costs the look into a dictionary.

    Parameters
    ----------
    kernel : str
        Name of the choice in tables.
    apart : tuple of str
        Arguments that are no facts, such as lengths: they count as far as the function's own
        answer depends on them, which is part of what an entry is found by.
    """

    def decorate(choose: Callable[Arguments, Tiles]) -> Callable[Arguments, Tiles]:
        signature = inspect.signature(choose)
        unnamed = {*THE_GPU, *apart}
        answers: dict[Any, Tiles] = {}
        _remembered.append(answers)

        def answer(gpu: str, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tiles:
            default = choose(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            facts = {
                name: value if isinstance(value, int | str) else str(value)
                for name, value in bound.arguments.items()
                if name not in unnamed
            }
            return _answer(gpu, Question(kernel, facts, default))  # type: ignore[no-any-return]

        @wraps(choose)
        def remembered(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tiles:
            gpu = current_gpu()
            key = (gpu, args, *kwargs.items()) if kwargs else (gpu, args)
            found = answers.get(key)
            if found is None:
                if len(answers) >= MOST_REMEMBERED:
                    answers.clear()
                found = answers[key] = answer(gpu, *args, **kwargs)
            return found

        return remembered

    return decorate


@contextmanager
def forced(key: Key, tiles: Mapping[str, Value]) -> Iterator[None]:
    """Answer one question with given tiles, whatever the tables say."""
    _forced[key] = tiles
    _forget()
    try:
        yield
    finally:
        del _forced[key]
        _forget()


@contextmanager
def asked() -> Iterator[dict[Key, Question]]:
    """Yield a dictionary that gets every question that is asked meanwhile."""
    found: dict[Key, Question] = {}
    _listeners.append(found)
    _forget()
    try:
        yield found
    finally:
        _listeners.remove(found)


@cache
def tables(gpu: str) -> tuple[Mapping[Key, Entry], ...]:
    """Return the user's entries for a GPU and the package's, read once a process."""
    found = []
    try:
        path = user_table(gpu)
    except RuntimeError:  # no home folder, hence no table of the user's
        pass
    else:
        found.append(_entries(path, gpu))
    shipped = shipped_table(gpu)
    if shipped is not None:
        found.append(_entries(shipped, None))
    return tuple(found)


def _entries(path: Path, gpu: str | None) -> Mapping[Key, Entry]:
    """Return the entries of a file; none, with one warning, where it cannot be used."""
    try:
        table = read_table(path)
        if gpu is not None and (table.gpu, table.triton) != (gpu, triton_version()):
            raise TableError(f"made on {table.gpu} with Triton {table.triton}")
    except FileNotFoundError:
        return {}
    except TableError as error:
        warnings.warn(
            f"tuned tiles in {path} are not used: {error}; delete the file, or let "
            "'longctx tune' write it anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    # the package's table may be another compiler's: no fault of the user's, and no use either
    return table.entries if table.triton == triton_version() else {}


def _answer(gpu: str, question: Question) -> Any:
    key = question.key
    for listener in _listeners:
        listener[key] = question
    tiles = _forced.get(key)
    if tiles is None and gpu:
        entries = (table.get(key) for table in tables(gpu))
        tiles = next((entry.tiles for entry in entries if entry is not None), None)
    return question.default if tiles is None else question.default._replace(**tiles)


def _forget() -> None:
    """Forget answers, and what the backend's functions remember of them."""
    for answers in _remembered:
        answers.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("longctx_triton.") and not name.startswith(_HERE):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
