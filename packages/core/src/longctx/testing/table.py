"""The conformance table: what passed, failed or was skipped, by backend, op and data type."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from longctx.protocols.families import OPS

__all__ = ["PROPERTY", "Cell", "ConformanceTable"]

PROPERTY = "longctx"
"""Name of the `user_properties` entry that carries a test's measurements to the table."""

_UNDECLARED = "not declared"
_SURPLUS = "runs but is not declared"


@dataclass
class Cell:
    """Counts and worst error of one op in one data type."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    undeclared: int = 0
    xfailed: int = 0
    error: float = 0.0
    used: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.failed:
            return f"{self.failed} FAILED, {self.passed} passed"
        if self.passed:
            return f"{self.passed} passed" + (f", {self.xfailed} xfailed" if self.xfailed else "")
        if self.xfailed:
            return f"{self.xfailed} xfailed"
        return "undeclared" if self.undeclared else "skipped"


class ConformanceTable:
    """Results of a run, collected from the reports of its tests."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str, str], Cell] = defaultdict(Cell)
        self.surplus: list[str] = []
        self._failed: set[str] = set()

    def add(self, report: pytest.TestReport) -> None:
        """Count one report; only the last word on each test counts as a pass."""
        found: dict[str, Any] | None = dict(report.user_properties).get(PROPERTY)  # type: ignore[assignment]
        if found is None:
            return
        cell = self.cells[found["backend"], found["op"], found["dtype"]]
        cell.error = max(cell.error, found["error"])
        cell.used = max(cell.used, found["used"])
        if report.failed:
            if report.nodeid not in self._failed:
                self._failed.add(report.nodeid)
                cell.failed += 1
                cell.failures.append(report.nodeid)
                # a test that passed and whose teardown fails is a failure
                cell.passed -= report.when == "teardown"
        elif report.skipped:
            self._skip(cell, report, found)
        elif report.when == "call":
            cell.passed += 1

    def _skip(self, cell: Cell, report: pytest.TestReport, found: dict[str, Any]) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if hasattr(report, "wasxfail"):
            cell.xfailed += 1
        elif _SURPLUS in reason:
            cell.undeclared += 1
            self.surplus.append(f"{found['backend']}: {reason.partition(f'{_SURPLUS}: ')[2]}")
        elif _UNDECLARED in reason:
            cell.undeclared += 1
        else:
            cell.skipped += 1

    def backends(self) -> list[str]:
        """Return the backends that were tested."""
        return sorted({backend for backend, _, _ in self.cells})

    def rows(self, backend: str) -> Iterator[tuple[str, dict[str, Cell]]]:
        """Yield each op of a backend with its cells by data type."""
        for op in OPS:
            cells = {d: cell for (b, o, d), cell in self.cells.items() if (b, o) == (backend, op)}
            if cells:
                yield op, cells

    def lines(self) -> Iterator[str]:
        """Yield the table as text."""
        order = ("bf16", "fp16", "fp32", "fp8_e4m3", "fp64", "-")
        for backend in self.backends():
            dtypes = {d for _, cells in self.rows(backend) for d in cells}
            shown = [d for d in order if d in dtypes - {"-"}]
            yield f"{backend:<25}" + "".join(f"{d:<24}" for d in shown) + "max error   used"
            for op, cells in self.rows(backend):
                texts = [str(cells[d]) if d in cells else "undeclared" for d in shown]
                error = max(cell.error for cell in cells.values())
                used = max(cell.used for cell in cells.values())
                measured = f"{error:9.2e}  {used:5.0%}" if error or used else ""
                yield f"{op:<25}" + "".join(f"{text:<24}" for text in texts) + measured
        for line in sorted(set(self.surplus)):
            yield f"{_SURPLUS}: {line}"

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready values."""
        results = [
            {
                "backend": backend,
                "op": op,
                "dtype": dtype,
                "passed": cell.passed,
                "failed": cell.failed,
                "skipped": cell.skipped,
                "undeclared": cell.undeclared,
                "xfailed": cell.xfailed,
                "max_error": cell.error,
                "budget_used": cell.used,
                "failures": cell.failures,
            }
            for (backend, op, dtype), cell in sorted(self.cells.items())
        ]
        return {"results": results, "runs_but_undeclared": sorted(set(self.surplus))}
