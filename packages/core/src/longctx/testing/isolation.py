"""Tests in another process, so that a backend that ends the interpreter ends one test only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = ["ChildLog", "IsolatedGroups", "option_arguments"]

_PASSED_ON = ("device", "max_length", "seed", "xfails")
_GROUP_SECONDS = 3600
_MOST_CRASHES = 2
"""Of one op; every crash costs a new process, and the tests after it say that they were left."""


def option_arguments(config: pytest.Config) -> list[str]:
    """Return the kit's options of this run as arguments of a child's command line."""
    arguments = [f"--longctx-backend={name}" for name in config.option.longctx_backend or ()]
    for name in _PASSED_ON:
        value = getattr(config.option, f"longctx_{name}")
        if value is not None:
            if name == "xfails":
                value = Path(value).absolute()
            arguments.append(f"--longctx-{name.replace('_', '-')}={value}")
    return arguments


class ChildLog:
    """What a child writes for its parent: a line when a test starts, a line for each report.

    Parameters
    ----------
    path : str
        File to append to; closed after every line, so that it survives a crash.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def write(self, **entry: Any) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class IsolatedGroups:
    """Runs groups of tests in children and keeps their reports until pytest asks for them.

    Parameters
    ----------
    config : pytest.Config
        Configuration of the parent.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self._reports: dict[str, list[pytest.TestReport]] = {}

    def reports(self, item: pytest.Item, group: Sequence[pytest.Item]) -> list[pytest.TestReport]:
        """Return the reports of a test, running its whole group first if need be."""
        if item.nodeid not in self._reports:
            self._run(group)
        return self._reports[item.nodeid]

    def _run(self, group: Sequence[pytest.Item]) -> None:
        """Run a group; after a crash, go on behind the test that crashed, a few times."""
        left = list(group)
        status = ""
        for _ in range(_MOST_CRASHES):
            started, found, status = self._child(left)
            self._reports.update(found)
            # a child that stops between tests, or before the first, is held against the next one
            crashed = started[-1] if started and started[-1] not in found else None
            remaining = [item for item in left if item.nodeid not in found]
            if not remaining:
                return
            victim = next((i for i in remaining if i.nodeid == crashed), remaining[0])
            why = "in this test"
            self._reports[victim.nodeid] = [_crash_report(victim, status, why)]
            left = [item for item in remaining if item is not victim]
        for item in left:
            why = f"{_MOST_CRASHES} times in other tests of this op; this one was not run"
            self._reports[item.nodeid] = [_crash_report(item, status, why)]

    def _child(
        self, items: Sequence[pytest.Item]
    ) -> tuple[list[str], dict[str, list[pytest.TestReport]], str]:
        by_address = {_address(item): item.nodeid for item in items}
        with tempfile.TemporaryDirectory() as folder:
            log, arguments = Path(folder) / "reports.jsonl", Path(folder) / "arguments"
            log.touch()
            arguments.write_text("\n".join(by_address), encoding="utf-8")
            command = [sys.executable, "-X", "faulthandler", "-m", "pytest", f"@{arguments}"]
            command += ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
            command += [f"--rootdir={self.config.rootpath}", "--longctx-isolate=never"]
            command += [*option_arguments(self.config), f"--longctx-child-reports={log}"]
            try:
                done = subprocess.run(
                    command,
                    cwd=self.config.rootpath,
                    capture_output=True,
                    text=True,
                    timeout=_GROUP_SECONDS,
                    check=False,
                )
                status, output = f"exit status {done.returncode}", done.stdout + done.stderr
                if done.returncode < 0:
                    status = f"signal {-done.returncode}"
            except subprocess.TimeoutExpired:
                status, output = f"no end within {_GROUP_SECONDS} s", ""
            entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        nodeids = {_rest(address): nodeid for address, nodeid in by_address.items()}
        started: list[str] = []
        reports: dict[str, list[pytest.TestReport]] = {}
        for entry in entries:
            nodeid = nodeids.get(_rest(entry["nodeid"]), entry["nodeid"])
            if entry["event"] == "start":
                started.append(nodeid)
                reports[nodeid] = []
                continue
            report = self.config.hook.pytest_report_from_serializable(
                config=self.config, data=entry["report"]
            )
            report.nodeid = nodeid
            if isinstance(report.longrepr, list):  # JSON has no tuples; pytest wants one here
                report.longrepr = tuple(report.longrepr)
            reports[nodeid].append(report)
        # without a teardown a test was cut off in the middle
        whole = {
            n: found for n, found in reports.items() if any(r.when == "teardown" for r in found)
        }
        return started, whole, f"{status}\n{output[-4000:]}"


def _address(item: pytest.Item) -> str:
    return f"{item.path}::{_rest(item.nodeid)}"


def _rest(nodeid: str) -> str:
    """Return a node id without its file, whose path depends on the folder of the run."""
    return nodeid.split("::", 1)[-1]


def _crash_report(item: pytest.Item, status: str, why: str) -> pytest.TestReport:
    first, _, output = status.partition("\n")
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the backend ended the interpreter ({first}) {why}\n{output}",
        when="call",
        user_properties=list(item.user_properties),
    )
