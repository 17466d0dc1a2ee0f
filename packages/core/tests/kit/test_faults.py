"""The kit catches every planted fault, and passes the same backend without one."""

from __future__ import annotations

import pytest
from faulty_backends import FAULTS, SOUND_OPS

QUICK = ("--longctx-isolate=never", "--longctx-max-length=1000", "--longctx-seed=5")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_caught(run_kit, fault):
    run = run_kit("faulty_backends", f"--longctx-backend={fault}", "--exitfirst", *QUICK)
    failed = {row["op"] for row in run.rows(fault) if row["failed"]}
    assert failed == {FAULTS[fault].op}, run.output[-4000:]


@pytest.mark.slow
def test_the_backends_without_a_fault_pass(run_kit):
    names = [f"sound-{op}" for op in SOUND_OPS]
    chosen = [f"--longctx-backend={name}" for name in names]
    run = run_kit("faulty_backends", *chosen, *QUICK, file="test_cases.py")
    assert [run.count(name, "failed") for name in names] == [0] * len(names), run.output[-4000:]
    assert all(run.count(name, "passed") for name in names)
