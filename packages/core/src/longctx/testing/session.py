"""A run of the kit: parameters, subjects, expected failures, isolation and the closing table."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import longctx
from longctx.probes import cuda_driver
from longctx.protocols.backend import Backend
from longctx.protocols.families import OPS
from longctx.support import DTYPES, dtype_name
from longctx.testing.cases import CASES, Case
from longctx.testing.isolation import ChildLog, IsolatedGroups
from longctx.testing.selection import (
    OWN_BACKENDS,
    Chosen,
    choose_backends,
    device_for,
    dtypes_for,
)
from longctx.testing.subject import Subject
from longctx.testing.table import PROPERTY, ConformanceTable

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

__all__ = ["KitSession", "Parameter"]

_DEFAULT_DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Parameter:
    """What pytest passes to the fixture ``subject``.

    Attributes
    ----------
    chosen : Chosen
        The backend.
    op : str
        Public op name.
    dtype : torch.dtype or None
        None if the backend declares none that the test wants; the test is then skipped.
    case : Case or None
        The ready-made case, for tests that run over all of them.
    declared : bool
        False for a probe of what the backend does not declare.
    """

    chosen: Chosen
    op: str
    dtype: torch.dtype | None
    case: Case | None = None
    declared: bool = True

    @property
    def id(self) -> str:
        """Return the name for pytest."""
        parts = [self.chosen.name]
        if self.case is not None:
            parts.append(self.case.id)
        parts.append(dtype_name(self.dtype) if self.dtype else "undeclared")
        return "-".join(parts)


class KitSession:
    """State of one pytest run with tests of the kit."""

    def __init__(self, config: pytest.Config, backends: Sequence[Chosen]) -> None:
        self.config = config
        self.backends = backends
        self.table = ConformanceTable()
        self._groups = IsolatedGroups(config)
        path = config.option.longctx_child_reports
        self._log = ChildLog(path) if path else None

    @classmethod
    def from_config(cls, config: pytest.Config) -> KitSession:
        """Return the session for a command line.

        Raises
        ------
        pytest.UsageError
            If a backend asked for is unknown, or ends the process when it is loaded.
        """
        asked = config.option.longctx_backend or ()
        if config.option.longctx_device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--longctx-device cuda: PyTorch finds no GPU here")
        try:
            return cls(config, choose_backends(asked))
        except (longctx.BackendNotFoundError, RuntimeError) as error:
            raise pytest.UsageError(str(error)) from None

    def environment(self) -> dict[str, Any]:
        """Return what a result depends on: versions, protocol, GPU, driver, seed."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "longctx-core": longctx.__version__,
            "protocol": ".".join(map(str, longctx.PROTOCOL_VERSION)),
            "torch": torch.__version__,
            "gpu": gpu,
            "driver": ".".join(map(str, cuda_driver().version or ())) or None,
            "seed": self.config.option.longctx_seed,
            "backends": {b.name: self._version(b.name) for b in self.backends},
        }

    @staticmethod
    def _version(name: str) -> str:
        info = longctx.registry().backends[name]
        return f"{info.version} (protocol {'.'.join(map(str, info.protocol))})"

    def header(self) -> list[str]:
        """Return the lines of the report's header."""
        found = self.environment()
        backends = ", ".join(f"{name} {version}" for name, version in found["backends"].items())
        where = (
            f"gpu {found['gpu']}, driver for CUDA {found['driver']}" if found["gpu"] else "no gpu"
        )
        lines = [
            f"longctx: core {found['longctx-core']}, protocol {found['protocol']}, "
            f"torch {found['torch']}, {where}, seed {found['seed']}",
            f"longctx backends under test: {backends or 'none is usable here'}",
        ]
        return lines + [
            f"longctx backend {b.name} cannot be used here: "
            + "; ".join(reason.message for reason in b.reasons)
            for b in self.backends
            if b.loaded is None
        ]

    def parameters(
        self,
        op: str = "*",
        *,
        dtypes: Sequence[str] = _DEFAULT_DTYPES,
        cases: bool = False,
        declared: bool = True,
    ) -> list[ParameterSet]:
        """Return the parameters of a test.

        Parameters
        ----------
        op : str
            Public op name; ``"*"`` with ``cases`` for all of them.
        dtypes : sequence of str
            Short names of the data types that the test is meant for.
        cases : bool
            One test for each ready-made case of `longctx.testing.cases`.
        declared : bool
            False for probes of cases that the backend does not declare.
        """
        made: list[Parameter] = []
        for chosen in self.backends:
            if cases:
                made += self._case_parameters(chosen, op, dtypes, declared)
                continue
            found = dtypes_for(chosen.loaded, op, dtypes) if chosen.loaded else []
            made += [Parameter(chosen, op, dtype) for dtype in found]
            if not found:
                made.append(Parameter(chosen, op, None))
        return [pytest.param(parameter, id=parameter.id) for parameter in made]

    @staticmethod
    def _case_parameters(
        chosen: Chosen, op: str, dtypes: Sequence[str], declared: bool
    ) -> list[Parameter]:
        made = []
        for case in CASES:
            if op not in ("*", case.op) or chosen.loaded is None:
                continue
            support = chosen.loaded.support().get(case.op)
            if support is None and not _has_primitive(chosen.loaded, case.op):
                if not declared:  # so that the op has its row in the table
                    made.append(Parameter(chosen, case.op, None, case, declared))
                continue
            for name in dtypes:
                fits = (
                    support is not None
                    and DTYPES[name] in support.dtypes
                    and support.features.issuperset(case.features)
                )
                if fits == declared and (name == "fp32" or not case.fp32_only):
                    made.append(Parameter(chosen, case.op, DTYPES[name], case, declared))
        return made

    def subject(self, request: pytest.FixtureRequest) -> Iterator[Subject]:
        """Make the subject of a test; skip where the backend declares nothing that fits."""
        parameter: Parameter = request.param
        entry = self._properties(request.node, parameter)
        if parameter.chosen.loaded is None:
            why = "; ".join(reason.message for reason in parameter.chosen.reasons)
            pytest.skip(f"{parameter.chosen.name} cannot be used here: {why}")
        if parameter.dtype is None:
            pytest.skip(f"not declared: {parameter.op} in a data type that this test is for")

        def note(budget: Any) -> None:
            entry["error"] = max(entry["error"], budget.error)
            entry["used"] = max(entry["used"], min(budget.used, 1e9))

        yield Subject(
            backend=parameter.chosen.name,
            op=parameter.op,
            dtype=parameter.dtype,
            device=device_for(
                parameter.chosen.loaded, parameter.op, self.config.option.longctx_device
            ),
            loaded=parameter.chosen.loaded,
            generator=torch.Generator().manual_seed(self.config.option.longctx_seed),
            max_length=self.config.option.longctx_max_length,
            note=note,
            case=parameter.case,
        )

    @staticmethod
    def _properties(item: pytest.Item, parameter: Parameter) -> dict[str, Any]:
        """Attach the entry for the table to a test, once."""
        for name, found in item.user_properties:
            if name == PROPERTY and isinstance(found, dict):
                return found
        entry = {
            "backend": parameter.chosen.name,
            "op": parameter.op,
            "dtype": dtype_name(parameter.dtype) if parameter.dtype else "-",
            "error": 0.0,
            "used": 0.0,
        }
        item.user_properties.append((PROPERTY, entry))
        return entry

    def apply_xfails(self, items: Sequence[pytest.Item]) -> None:
        """Mark what the xfails file names; warn of its lines that name nothing."""
        path = self.config.option.longctx_xfails
        if not path:
            return
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise pytest.UsageError(f"--longctx-xfails {path}: {error.strerror}") from None
        for line in text.splitlines():
            wanted, _, reason = (part.strip() for part in line.partition("#"))
            if not wanted:
                continue
            tests = [item for item in items if _names(wanted, item.nodeid)]
            for item in tests:
                item.add_marker(pytest.mark.xfail(reason=reason or f"named in {path}"))
            if not tests:
                warnings.warn(
                    pytest.PytestWarning(f"{path} names a test that does not exist: {wanted}"),
                    stacklevel=2,
                )

    def run_isolated(self, item: pytest.Item) -> bool | None:
        """Report a test from a child process if its backend is to be isolated."""
        parameter = _parameter(item)
        if parameter is None or not self._is_isolated(parameter):
            return None
        self._properties(item, parameter)
        key = (parameter.chosen.name, parameter.op)
        group = [
            other
            for other in item.session.items
            if (found := _parameter(other)) is not None
            and (found.chosen.name, found.op) == key
            and self._is_isolated(found)
        ]
        for other in group:
            found = _parameter(other)
            assert found is not None
            self._properties(other, found)
        reports = self._groups.reports(item, group)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _is_isolated(self, parameter: Parameter) -> bool:
        if parameter.dtype is None:
            return False  # nothing of the backend runs
        wanted = self.config.option.longctx_isolate
        if wanted != "auto":
            return bool(wanted == "always")
        # what is not declared may do anything to a GPU, and the tests after it would suffer
        risky = not parameter.declared and torch.cuda.is_available()
        return risky or parameter.chosen.name not in OWN_BACKENDS

    def announce(self, nodeid: str) -> None:
        """Tell the parent that a test starts."""
        if self._log:
            self._log.write(event="start", nodeid=nodeid)

    def record(self, report: pytest.TestReport) -> None:
        """Count a report, and pass it on to the parent if this is a child."""
        self.table.add(report)
        if self._log:
            data = self.config.hook.pytest_report_to_serializable(
                config=self.config, report=report
            )
            self._log.write(event="report", nodeid=report.nodeid, report=data)

    def summarise(self, reporter: pytest.TerminalReporter) -> None:
        """Print the table and write the JSON file."""
        if not self.table.cells:
            return
        reporter.section("longctx conformance: op x data type")
        for line in self.header():
            reporter.write_line(line)
        for line in self.table.lines():
            reporter.write_line(line)
        if path := self.config.option.longctx_json:
            content = {"environment": self.environment(), **self.table.as_dict()}
            Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _has_primitive(backend: Backend, op: str) -> bool:
    for name in OPS[op]:
        try:
            backend.primitive(name)
        except KeyError:
            continue
        return True
    return False


def _parameter(item: pytest.Item) -> Parameter | None:
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get("subject") if callspec else None
    return found if isinstance(found, Parameter) else None


def _names(wanted: str, nodeid: str) -> bool:
    """Return whether a line of an xfails file names a test, with or without its file."""
    rest = nodeid.split("::", 1)[-1]
    return any(
        candidate == wanted or candidate.startswith((f"{wanted}::", f"{wanted}["))
        for candidate in (nodeid, rest, nodeid.rsplit("/", 1)[-1])
    )
