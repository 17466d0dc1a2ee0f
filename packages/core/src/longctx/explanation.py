"""What dispatch says when it is asked and not called: every backend, and why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longctx.support import OpRequest, Reason

__all__ = ["Candidate", "Explanation"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of an explanation: a backend, whether it can run the request, and if not, why."""

    backend: str
    priority: int | None
    reasons: tuple[Reason, ...]

    @property
    def can_run(self) -> bool:
        """Whether nothing speaks against the backend."""
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Explanation:
    """What dispatch would do with a request.

    Attributes
    ----------
    request : OpRequest
    chosen : str or None
        The backend that would run; None if none can.
    asked : str or None
        The backend asked for by name; it never falls back.
    asked_by : str
        ``"argument"``, ``"use()"``, ``"LONGCTX_BACKEND"`` or ``"priority"``.
    candidates : tuple of Candidate
        Every known backend, in the order of preference.
    """

    request: OpRequest
    chosen: str | None
    asked: str | None
    asked_by: str
    candidates: tuple[Candidate, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready values."""
        return {
            "op": self.request.op,
            "request": self.request.describe(),
            "chosen": self.chosen,
            "asked": self.asked,
            "asked_by": self.asked_by,
            "candidates": [
                {
                    "backend": c.backend,
                    "can_run": c.can_run,
                    "priority": c.priority,
                    "reasons": [r.as_dict() for r in c.reasons],
                }
                for c in self.candidates
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.request.op} for {self.request.describe()}"]
        if self.asked is not None:
            lines.append(f"  {self.asked} was asked for by {self.asked_by}: no other is tried")
        for candidate in self.candidates:
            mark = (
                "chosen"
                if candidate.backend == self.chosen
                else "yes"
                if candidate.can_run
                else "no"
            )
            if candidate.can_run:
                lines.append(f"  {candidate.backend:<8} {mark:<7} priority {candidate.priority}")
            for reason in candidate.reasons:
                hint = f"  -> {reason.hint}" if reason.hint else ""
                lines.append(
                    f"  {candidate.backend:<8} {mark:<7} {reason.code:<13} {reason.message}{hint}"
                )
        return "\n".join(lines)
