"""Who runs: installed backends through the public functions, and peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from longctx.bench.case import Case
from longctx.bench.peers import PEERS
from longctx.bench.peers.peer import Peer
from longctx.bench.prepared import Prepared
from longctx.bench.workloads import WORKLOADS, Inputs
from longctx.binding import public_function
from longctx.dispatch import BoundBackend, absent_backends, loaded_backend
from longctx.errors import BackendNotFoundError, nearest_name
from longctx.plugins import registry

__all__ = ["BackendContestant", "Contestant", "PeerContestant", "Roster", "find_contestants"]


class Contestant(Protocol):
    """Somebody who can run cases."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def kind(self) -> str:
        """``"backend"`` or ``"peer"``."""
        ...

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why a case is not run, in one sentence; None if it is."""
        ...

    def prepare(self, case: Case, inputs: Inputs, *, bound: bool) -> Prepared:
        """Return the call on some inputs; ``bound`` skips dispatch, as models do.

        What is timed is bound: a peer is called directly as well.
        """
        ...


@dataclass(frozen=True)
class BackendContestant:
    """An installed backend.

    Attributes
    ----------
    name : str
    """

    name: str
    kind: str = "backend"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why the backend lacks the op or the device; the call itself says the rest."""
        loaded = registry().load_backend(self.name)
        if isinstance(loaded, tuple):
            return "; ".join(reason.message for reason in loaded)
        support = loaded.support().get(case.op)
        if support is None:
            return f"does not implement {case.op}"
        if device.type not in support.devices:
            return f"runs on {'/'.join(sorted(support.devices))}"
        return None

    def prepare(self, case: Case, inputs: Inputs, *, bound: bool) -> Prepared:
        """Return the public function's call."""
        backend: str | BoundBackend = BoundBackend(self.name) if bound else self.name
        function: Callable[..., Any] = functools.partial(public_function(case.op), backend=backend)
        return WORKLOADS[case.op].prepare(case, inputs, function)


@dataclass(frozen=True)
class PeerContestant:
    """A library to compare with.

    Attributes
    ----------
    peer : Peer
    """

    peer: Peer
    kind: str = "peer"

    @property
    def name(self) -> str:
        """The peer's name."""
        return self.peer.name

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why the peer does not run the case."""
        if case.get("sequences", 1) > 1:
            return "the bench has no call of peers for packed sequences"
        return self.peer.refuses(case, device)

    def prepare(self, case: Case, inputs: Inputs, *, bound: bool) -> Prepared:
        """Return the peer's call; layouts were converted beforehand."""
        return self.peer.prepare(case, inputs)


@dataclass(frozen=True)
class Roster:
    """Who takes part, and who cannot.

    Attributes
    ----------
    contestants : tuple of Contestant
    left_out : mapping of str to str
        Reasons by name.
    """

    contestants: tuple[Contestant, ...]
    left_out: Mapping[str, str]


def find_contestants(
    ops: Sequence[str],
    device: torch.device,
    *,
    backends: Sequence[str] = (),
    peers: Sequence[str] = (),
) -> Roster:
    """Return the installed backends and the peers that know one of the ops.

    Parameters
    ----------
    ops : sequence of str
    device : torch.device
    backends, peers : sequence of str
        Names to restrict to; empty takes all, ``"none"`` takes none.

    Raises
    ------
    BackendNotFoundError
        If a name is unknown; names the nearest.
    """
    found: list[Contestant] = []
    left_out: dict[str, str] = {}
    absent = absent_backends()
    known = [*registry().backends, *absent]
    for name in _wanted("backend", backends, known):
        reasons = absent.get(name)
        if reasons is None:
            loaded = registry().load_backend(name)
            reasons = loaded if isinstance(loaded, tuple) else None
        if reasons is not None:
            first = reasons[0]  # longctx doctor tells the others
            left_out[name] = first.message + (f" ({first.hint})" if first.hint else "")
        elif not any(op in loaded_backend(name).support() for op in ops):
            left_out[name] = "declares none of these ops"
        else:
            found.append(BackendContestant(name))
    for name in _wanted("peer", peers, PEERS):
        peer = PEERS[name]
        if not peer.ops & set(ops):
            continue
        missing = peer.missing(device)
        if missing is None:
            found.append(PeerContestant(peer))
        else:
            left_out[name] = missing
    return Roster(tuple(found), left_out)


def _wanted(
    kind: str, names: Sequence[str], known: Sequence[str] | Mapping[str, Any]
) -> list[str]:
    if not names:
        return list(known)
    for name in names:
        if name not in known and name != "none":
            raise BackendNotFoundError(
                f"no {kind} is called {name!r}: {nearest_name(name, [*known, 'none'])}"
            )
    return [name for name in dict.fromkeys(names) if name != "none"]
