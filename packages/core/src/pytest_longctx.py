"""The pytest plugin of longctx-core: options, fixtures and the table of the conformance kit.

Every pytest run of an environment that has longctx-core imports this module, so it imports
neither torch nor longctx; the hooks do, once a test of the kit is collected.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from longctx.testing.session import KitSession
    from longctx.testing.subject import Subject

pytest.register_assert_rewrite("longctx.testing.suite", "longctx.testing.budget")

MARKER = "longctx_op"
_SESSION = pytest.StashKey["KitSession"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the kit."""
    group = parser.getgroup("longctx", "conformance of attention backends")
    group.addoption(
        "--longctx-backend",
        action="append",
        metavar="NAME",
        help="backend under test; may be repeated; default: every backend that is usable here",
    )
    group.addoption(
        "--longctx-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto: a GPU if there is one that the backend declares",
    )
    group.addoption(
        "--longctx-max-length",
        type=int,
        default=4099,
        metavar="N",
        help="leave out longer sequences, for backends that run in an interpreter (default 4099)",
    )
    group.addoption(
        "--longctx-xfails",
        metavar="FILE",
        help="tests expected to fail: one id or beginning of an id a line, # starts a comment",
    )
    group.addoption(
        "--longctx-json", metavar="FILE", help="write the conformance table as JSON to FILE"
    )
    group.addoption(
        "--longctx-isolate",
        choices=("auto", "always", "never"),
        default="auto",
        help="run each op in a process of its own, so that a crash ends that op's test alone; "
        "auto: for backends that longctx does not bring itself",
    )
    group.addoption(
        "--longctx-seed",
        type=int,
        metavar="N",
        help="seed of the random inputs; default: a fresh one, printed in the header",
    )
    group.addoption("--longctx-child-reports", metavar="FILE", help=argparse.SUPPRESS)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker that names a test's op, and the reporter; draw a seed."""
    config.addinivalue_line(
        "markers", f"{MARKER}(op): conformance test of an op, run for every backend under test"
    )
    config.pluginmanager.register(_Reporter(config), "longctx-reporter")
    if config.option.longctx_seed is None:
        # drawn here, not in each worker of pytest-xdist, so that all have the same
        config.option.longctx_seed = secrets.randbelow(2**31)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse a backend that does not exist, or that ends the process, before anything runs."""
    if session.config.getoption("longctx_backend"):
        _session(session.config)


def _session(config: pytest.Config) -> KitSession:
    if _SESSION not in config.stash:
        from longctx.testing.session import KitSession

        config.stash[_SESSION] = KitSession.from_config(config)
    return config.stash[_SESSION]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name backends, versions, protocol and GPU when a backend was asked for."""
    return _session(config).header() if config.getoption("longctx_backend") else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of the kit for every backend and every data type that it declares."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is not None and "subject" in metafunc.fixturenames:
        parameters = _session(metafunc.config).parameters(*marker.args, **marker.kwargs)
        metafunc.parametrize("subject", parameters, indirect=True)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """Return the backend, op, data type and device under test."""
    yield from _session(request.config).subject(request)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that the xfails file names; warn of lines that name none."""
    if _SESSION in config.stash:
        _session(config).apply_xfails(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Run the tests of a backend that may crash in a process of their own."""
    if _SESSION in item.config.stash:
        return _session(item.config).run_isolated(item)
    return None


class _Reporter:
    """The hooks that pytest calls without a configuration."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell the parent process, if there is one, which test is running."""
        if self.config.getoption("longctx_child_reports"):
            _session(self.config).announce(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a result in the table."""
        if any(name == "longctx" for name, _ in report.user_properties):
            _session(self.config).record(report)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table op x data type and write it as JSON."""
    if _SESSION in config.stash:
        _session(config).summarise(terminalreporter)
