"""Exceptions raised by longctx; a message says in one sentence what, where and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendNotFoundError",
    "CheckpointError",
    "LongctxError",
    "PluginError",
    "UnsupportedError",
    "nearest_name",
]


class LongctxError(Exception):
    """Base class of the errors that longctx defines itself."""


class UnsupportedError(LongctxError, NotImplementedError):
    """No backend, or not the one asked for by name, can run the request."""


class BackendNotFoundError(LongctxError, LookupError):
    """A backend, method, op or selector name that nobody registered."""


class PluginError(LongctxError):
    """A plugin that could not be used; raised only with ``LONGCTX_STRICT_PLUGINS=1``."""


class CheckpointError(LongctxError, ValueError):
    """A checkpoint directory that is incomplete, damaged, unsafe or of an unknown kind."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return a hint naming the nearest known name, for the end of an error sentence.

    Parameters
    ----------
    name : str
        What the caller asked for.
    known : iterable of str
        Valid names.

    Returns
    -------
    str
        ``"did you mean 'x'? "`` (when one is near) followed by the list of known names.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"
