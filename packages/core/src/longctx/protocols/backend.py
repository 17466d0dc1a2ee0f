"""What a backend plugin hands over: cheap metadata first, kernels on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from longctx.support import OpRequest, OpSupport, Reason

__all__ = ["Backend", "BackendInfo"]


@runtime_checkable
class Backend(Protocol):
    """A loaded backend: its declared support and its primitives.

    `longctx.backend_base.BackendBase` is a ready implementation from two mappings.
    """

    def support(self) -> Mapping[str, OpSupport]:
        """Return one table for each public op (`longctx.protocols.families.OPS`) that can run."""
        ...

    def reasons(self, request: OpRequest) -> Sequence[Reason]:
        """Return refusals that the tables cannot express; empty when there are none.

        Must be cheap and pure: no compilation, no device synchronisation.
        """
        ...

    def primitive(self, name: str) -> Callable[..., Any]:
        """Return the function behind a name of `longctx.protocols.attention`.

        Raises
        ------
        KeyError
            If the backend lacks it.
        """
        ...


def _nothing_missing() -> Sequence[Reason]:
    return ()


@dataclass(frozen=True)
class BackendInfo:
    """Metadata of a backend, cheap enough to build at every start.

    Attributes
    ----------
    name : str
        The name that users type; lower case, unique.
    version : str
        Version of the distribution that brings it.
    protocol : (int, int)
        The `longctx.PROTOCOL_VERSION` it was written for.
    load : callable
        Imports the kernels and returns the `Backend`; called once, on first use.
    missing : callable
        Returns what this machine lacks (library, driver, GPU) without importing the kernels.
    description, url : str
        One line for ``longctx backends``; where to read more.
    """

    name: str
    version: str
    protocol: tuple[int, int]
    load: Callable[[], Backend]
    missing: Callable[[], Sequence[Reason]] = _nothing_missing
    description: str = ""
    url: str = ""
