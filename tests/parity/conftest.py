"""Collects the errors that the parity tests measured and prints them as a table."""

from __future__ import annotations

from collections import defaultdict

import pytest

from longctx.support import dtype_name

_WORST = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_WORST] = defaultdict(lambda: (0.0, 0.0))


@pytest.fixture
def parity_table(request):
    """Return a function that records (backend, op, dtype, budget)."""
    worst = request.config.stash[_WORST]

    def record(backend, op, dtype, budget):
        key = (backend, op, dtype_name(dtype))
        error, used = worst[key]
        worst[key] = (max(error, budget.error), max(used, budget.used))

    return record


def pytest_terminal_summary(terminalreporter, config):
    worst = config.stash[_WORST]
    if not worst:
        return
    terminalreporter.section("parity: largest error against the fp64 oracle, share of the budget")
    terminalreporter.write_line(
        f"{'backend':<10}{'op':<26}{'dtype':<7}{'max error':>11}{'used':>8}"
    )
    for (backend, op, dtype), (error, used) in sorted(worst.items()):
        terminalreporter.write_line(f"{backend:<10}{op:<26}{dtype:<7}{error:>11.2e}{used:>8.0%}")
