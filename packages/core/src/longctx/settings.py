"""Reading ``LONGCTX_*`` environment variables: bounded numbers, switches, a folder.

They are read at each use, so that a process may change them between calls.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longctx.errors import nearest_name

__all__ = ["SETTINGS", "Setting", "budget_bytes", "cache_dir", "number", "switched_on"]


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
    text = os.environ.get(name, "").strip()
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


def switched_on(name: str) -> bool:
    """Return whether a yes/no variable is set to anything but nothing, 0, false, no or off."""
    text = os.environ.get(name)
    return text is not None and text.strip().lower() not in ("", "0", "false", "no", "off")


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
