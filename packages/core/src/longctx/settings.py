"""Reading ``LONGCTX_*`` environment variables: bounded numbers, switches, a folder.

They are read at each use, so that a process may change them between calls.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from longctx.errors import nearest_name

__all__ = ["SETTINGS", "Setting", "budget_bytes", "cache_dir", "is_set", "number", "switched_on"]


@dataclass(frozen=True, slots=True)
class Setting:
    """A number that an environment variable may override.

    Attributes
    ----------
    default : float
    least : float
        The variable must be above this.
    meaning : str
        One phrase for the documentation and for error messages.
    """

    default: float
    least: float
    meaning: str


SETTINGS: Mapping[str, Setting] = {
    "LONGCTX_INDEX_BUDGET_MIB": Setting(
        512, 0, "MiB that index_topk may hold besides its inputs and its result"
    ),
    "LONGCTX_CHUNK_BUDGET_MIB": Setting(
        256, 0, "MiB of scores and gathered keys that the torch backend holds at a time"
    ),
}
"""Every numeric setting by the name of its environment variable."""


def number(name: str) -> float:
    """Return a setting: its environment variable if that is set, else its default.

    Parameters
    ----------
    name : str
        A key of `SETTINGS`.

    Raises
    ------
    LookupError
        If there is no such setting.
    ValueError
        If the variable holds no number, or one out of bounds.
    """
    if name not in SETTINGS:
        raise LookupError(f"no setting is called {name!r}: {nearest_name(name, SETTINGS)}")
    setting = SETTINGS[name]
    text = os.environ[name].strip() if is_set(name) else ""
    if not text:
        return setting.default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not setting.least < value < math.inf:
        raise ValueError(
            f"{name} ({setting.meaning}) must be a number above {setting.least:g}, got {text!r}: "
            f"unset it for the default {setting.default:g}"
        )
    return value


def budget_bytes(name: str) -> int:
    """Return a setting in MiB as whole bytes."""
    return int(number(name) * 2**20)


def is_set(name: str) -> bool:
    """Return whether an environment variable is there, quickly where it is not."""
    return _stored(name) in _ENVIRONMENT


def switched_on(name: str) -> bool:
    """Return whether a yes/no variable is set to anything but nothing, 0, false, no or off."""
    if not is_set(name):
        return False
    return os.environ[name].strip().lower() not in ("", "0", "false", "no", "off")


_ENVIRONMENT: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
"""What ``os.environ`` looks into: it raises and catches two errors where a name is missing."""


@cache
def _stored(name: str) -> Any:
    """Return a name as it is kept there."""
    encode = getattr(os.environ, "encodekey", None)
    return name if encode is None or _ENVIRONMENT is os.environ else encode(name)


def cache_dir() -> Path:
    """Return the folder of what can be made again; it need not exist.

    That is ``LONGCTX_CACHE_DIR``, else ``longctx`` in ``XDG_CACHE_HOME`` or in ``~/.cache``.

    Raises
    ------
    RuntimeError
        If no variable is set and the user has no home folder.
    """
    own = os.environ.get("LONGCTX_CACHE_DIR", "").strip()
    if own:
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG specification wants relative paths ignored
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "longctx"
