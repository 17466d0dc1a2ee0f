"""The kit catches every planted fault, and passes the same backend without one."""

from __future__ import annotations

import pytest
from faulty_backends import FAULTS, SOUND_OPS


@pytest.fixture(scope="module")
def run(run_kit):
    names = [*FAULTS, *(f"sound-{op}" for op in SOUND_OPS)]
    arguments = [f"--longctx-backend={name}" for name in names]
    return run_kit("faulty_backends", "--longctx-isolate=never", "--longctx-seed=5", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_caught(run, fault):
    failed = {row["op"]: row["failed"] for row in run.rows(fault)}
    assert failed.pop(FAULTS[fault].op, 0) > 0, run.output[-2000:]
    assert not any(failed.values())


@pytest.mark.slow
@pytest.mark.parametrize("op", SOUND_OPS)
def test_the_backend_without_a_fault_passes(run, op):
    assert run.count(f"sound-{op}", "passed") > 0
    assert run.count(f"sound-{op}", "failed") == 0, run.output[-4000:]
