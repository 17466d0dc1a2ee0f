"""The kit itself: what it tells apart, what it survives, what it writes."""

from __future__ import annotations

import pytest

CASES = "test_cases.py"


def test_a_crash_ends_one_test_and_is_named(run_kit):
    run = run_kit("odd_backends", "--longctx-backend=crashes-when-run", file=CASES)
    by_op = {row["op"]: row for row in run.rows("crashes-when-run") if row["dtype"] == "bf16"}
    assert by_op["lightning_decode"]["passed"] == 0
    assert by_op["lightning_decode"]["failed"] >= 5
    assert by_op["merge_attention"]["passed"] == 5
    assert "ended the interpreter (signal 11) in this test" in run.output
    assert "2 times in other tests of this op; this one was not run" in run.output


def test_a_crash_in_loading_is_one_sentence(run_kit):
    run = run_kit("odd_backends", "--longctx-backend=crashes-when-loaded", file=CASES)
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert (
        "loading backend 'crashes-when-loaded' ends the Python process (signal 11)" in run.output
    )


def test_undeclared_and_surplus_are_told_apart(run_kit):
    run = run_kit("odd_backends", "--longctx-backend=modest", file=CASES)
    assert run.status == 0
    rows = {(row["op"], row["dtype"]): row for row in run.rows("modest")}
    assert rows["lightning_decode", "bf16"]["passed"] > 0
    assert rows["lightning_decode", "fp16"]["undeclared"] == 1
    assert rows["flash_attention", "-"]["undeclared"] > 0
    surplus = " ".join(run.table["runs_but_undeclared"])
    assert "lightning_decode-step in torch.float16" in surplus
    assert "flash_attention" not in surplus


def test_an_unknown_backend_is_refused_with_the_nearest_name(run_kit):
    run = run_kit("odd_backends", "--longctx-backend=tor", file=CASES)
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert "torch" in run.output


def test_the_header_names_versions_and_backend(run_kit):
    run = run_kit("odd_backends", "--longctx-backend=torch", "-k", "merge", file=CASES)
    environment = run.table["environment"]
    assert environment["protocol"] == "1.0"
    assert environment["backends"] == {"torch": "0.1.0 (protocol 1.0)"}
    assert f"seed {environment['seed']}" in run.output.replace("\n", " ")


def test_expected_failures_are_applied_and_stale_ones_warned_of(run_kit, tmp_path):
    listed = tmp_path / "xfails.txt"
    listed.write_text("# known\nTestEveryOp::test_that_was_removed  # gone\nTestEveryOp\n")
    run = run_kit(
        "faulty_backends",
        "--longctx-backend=unrescaled-merge",
        "--longctx-isolate=never",
        f"--longctx-xfails={listed}",
        file=CASES,
    )
    assert "names a test that does not exist: TestEveryOp::test_that_was_removed" in run.output
    assert run.count("unrescaled-merge", "xfailed") > 0


def test_an_unreadable_list_of_expected_failures_is_refused(run_kit):
    run = run_kit(
        "odd_backends", "--longctx-backend=torch", "--longctx-xfails=missing.txt", file=CASES
    )
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert "missing.txt: No such file or directory" in run.output
