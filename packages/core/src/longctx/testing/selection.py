"""Which backends a run of the kit tests, on which device, in which data types."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

import longctx
from longctx.protocols.backend import Backend
from longctx.support import DTYPES, Reason

__all__ = ["OWN_BACKENDS", "Chosen", "choose_backends", "device_for", "dtypes_for"]

OWN_BACKENDS = frozenset({"torch", "triton", "cupy", "numba"})
"""Backends that come with longctx; the others run isolated by default."""

_LOAD_SECONDS = 300


@dataclass(frozen=True)
class Chosen:
    """A backend under test.

    Attributes
    ----------
    name : str
    loaded : Backend or None
        None if it cannot be used here.
    reasons : tuple of Reason
        Why not; empty if it can.
    """

    name: str
    loaded: Backend | None
    reasons: tuple[Reason, ...] = ()


def choose_backends(asked: Sequence[str]) -> tuple[Chosen, ...]:
    """Return the backends asked for, or every one that is usable here.

    Raises
    ------
    longctx.BackendNotFoundError
        If a backend asked for is not installed.
    RuntimeError
        If loading a stranger's backend ends the Python process.
    """
    installed = longctx.registry().backends
    for name in asked:
        if name not in installed:
            with longctx.use(name):  # raises with the nearest name or the install command
                raise AssertionError("an unknown backend was accepted")
    chosen = [_load(name) for name in dict.fromkeys(asked or installed)]
    return tuple(one for one in chosen if asked or one.loaded is not None)


def _load(name: str) -> Chosen:
    if name not in OWN_BACKENDS:
        _survive_loading(name)
    loaded = longctx.registry().load_backend(name)
    if isinstance(loaded, tuple):
        return Chosen(name, None, loaded)
    return Chosen(name, loaded)


def _survive_loading(name: str) -> None:
    """Load a backend in another process first: what ends that one would end this one."""
    code = f"import longctx; longctx.registry().load_backend({name!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, timeout=_LOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"backend {name!r} did not load within {_LOAD_SECONDS} s") from None
    if done.returncode < 0:
        raise RuntimeError(
            f"loading backend {name!r} ends the Python process (signal {-done.returncode}): run "
            f'python -X faulthandler -c "{code}" to see where'
        )


def device_for(backend: Backend, op: str, wanted: str) -> torch.device:
    """Return where to test an op: ``wanted``, or for ``"auto"`` a declared GPU before the CPU."""
    support = backend.support().get(op)
    if wanted != "auto":
        return torch.device(wanted)
    declared: Iterable[str] = support.devices if support else ("cpu",)
    return torch.device("cuda" if torch.cuda.is_available() and "cuda" in declared else "cpu")


def dtypes_for(backend: Backend, op: str, among: Sequence[str] | None = None) -> list[torch.dtype]:
    """Return the data types that a backend declares for an op, in a fixed order."""
    support = backend.support().get(op)
    if support is None:
        return []
    return [
        dtype
        for name, dtype in DTYPES.items()
        if dtype in support.dtypes and (among is None or name in among)
    ]
