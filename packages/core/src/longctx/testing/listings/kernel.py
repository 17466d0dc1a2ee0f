"""What can be compiled: the protocol of a kernel, where its code stands, and the two errors."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from longctx.errors import LongctxError
from longctx.testing.listings.listing import Listing

__all__ = [
    "CompilerNotFoundError",
    "Kernel",
    "KernelCompileError",
    "compute_capability",
    "load_object",
]


class CompilerNotFoundError(LongctxError, ImportError):
    """A compiler, or a library that it needs, is not installed."""


class KernelCompileError(LongctxError, RuntimeError):
    """A kernel does not compile; the message has what the compiler said."""


class Kernel(Protocol):
    """A kernel with all that its compiler must know; picklable."""

    @property
    def label(self) -> str:
        """Name of this variant, for messages and test ids."""

    def compile(self, arch: str) -> Listing:
        """Compile for one architecture such as ``"sm_90a"``, in this process.

        Raises
        ------
        CompilerNotFoundError
            The compiler is not installed.
        KernelCompileError
            The kernel does not compile.
        """


def load_object(source: str) -> Any:
    """Import what ``"package.module:name"`` or ``"path/to/file.py:name"`` names.

    Raises
    ------
    KernelCompileError
        There is no such module, file or name, or importing it fails.
    """
    place, _, name = source.rpartition(":")
    try:
        module = (
            _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
        return getattr(module, name)
    except Exception as error:
        raise KernelCompileError(
            f"{source!r} cannot be loaded ({type(error).__name__}: {error}); "
            "expected 'package.module:name' or 'path/to/file.py:name'"
        ) from error


def _load_file(path: Path) -> ModuleType:
    name = "_listed_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def compute_capability(arch: str) -> tuple[int, int, str]:
    """Split ``"sm_90a"`` into major 9, minor 0 and suffix ``"a"``.

    Raises
    ------
    ValueError
        The architecture is not spelt so.
    """
    match = re.fullmatch(r"sm_(\d+)(\d)(a?)", arch)
    if match is None:
        raise ValueError(f"architecture {arch!r}; expected a spelling such as 'sm_80' or 'sm_90a'")
    return int(match[1]), int(match[2]), match[3]
