"""What a peer offers, and how its absence is told."""

from __future__ import annotations

import importlib
from typing import Protocol

import torch

from longctx.bench.case import Case
from longctx.bench.prepared import Prepared
from longctx.bench.workloads.workload import Inputs

__all__ = ["Peer", "missing_module", "only_cuda"]


class Peer(Protocol):
    """A library that computes what some ops compute."""

    @property
    def name(self) -> str:
        """Name in tables and for ``--peer``."""
        ...

    @property
    def ops(self) -> frozenset[str]:
        """Public ops that it has a counterpart of."""
        ...

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run here at all, with the remedy; None if it can."""
        ...

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why it does not run a case of its ops, in one sentence; None if it does."""
        ...

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Return its call on some inputs, converted to its layout beforehand."""
        ...


def missing_module(module: str, distribution: str, command: str) -> str | None:
    """Return why a module cannot be imported; None if it can.

    Parameters
    ----------
    module : str
        What is imported.
    distribution : str
        What users call it.
    command : str
        How to install it.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return f"{distribution} is not installed ({command})"
        return f"{distribution} needs the module {error.name}"
    except Exception as error:  # a library that does not fit its own dependencies
        return f"{distribution} fails to import: {type(error).__name__}: {error}"
    return None


def only_cuda(device: torch.device) -> str | None:
    """Return the refusal of a library that runs on NVIDIA GPUs alone; None on one."""
    return None if device.type == "cuda" else f"runs on cuda, not on {device.type}"
