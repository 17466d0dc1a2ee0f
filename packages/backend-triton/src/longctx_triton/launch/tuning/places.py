"""Where tables lie: the user's in the cache folder, the package's beside its code."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from pathlib import Path

from longctx.settings import cache_dir

__all__ = ["shipped_table", "triton_version", "user_table"]

_SHIPPED = Path(__file__).parents[2] / "tuned"


@cache
def triton_version() -> str:
    """Return major and minor version of the installed Triton, such as ``"3.6"``."""
    return ".".join(metadata.version("triton").split(".")[:2])


def user_table(gpu: str) -> Path:
    """Return the file of the user's own tiles for a GPU; it need not exist.

    Raises
    ------
    RuntimeError
        If the user has no home folder and no variable names one.
    """
    words = "-".join(_words(gpu))
    return cache_dir() / "triton" / f"{words}-triton{triton_version()}.json"


def shipped_table(gpu: str) -> Path | None:
    """Return the package's table for a GPU, found by a word of its name: ``h100.json``."""
    paths = (_SHIPPED / f"{word}.json" for word in _words(gpu))
    return next((path for path in paths if path.is_file()), None)


def _words(gpu: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", gpu.lower())
