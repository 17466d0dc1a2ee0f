"""A ready `Backend` from a support table and a table of primitives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longctx.support import OpRequest, OpSupport, Reason

__all__ = ["BackendBase"]


class BackendBase:
    """A backend built from two mappings; subclass it to add refusals of its own.

    Parameters
    ----------
    support : mapping of str to OpSupport
        One table for each op that can run.
    primitives : mapping of str to callable
        The functions by the names of `longctx.protocols.attention`.
    """

    def __init__(
        self, support: Mapping[str, OpSupport], primitives: Mapping[str, Callable[..., Any]]
    ) -> None:
        self._support = dict(support)
        self._primitives = dict(primitives)

    def support(self) -> Mapping[str, OpSupport]:
        """Return the declared tables."""
        return self._support

    def reasons(self, request: OpRequest) -> Sequence[Reason]:
        """Return no refusal beyond the tables."""
        return ()

    def primitive(self, name: str) -> Callable[..., Any]:
        """Return the primitive called ``name``."""
        return self._primitives[name]
