"""The command line: tables, JSON, one-line errors with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from longctx import cli


@pytest.fixture
def run(capsys):
    """Return a function that runs ``longctx`` in-process: (exit code, stdout, stderr)."""

    def command(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return command


def test_doctor_json_names_every_backend_and_what_is_missing(run):
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    rows = {row["name"]: row for row in report["backends"]}
    assert rows["torch"]["usable"]
    assert rows["torch"]["smoke"]["max_error"] < 1e-4
    for name in ("triton", "cupy", "numba"):
        assert rows[name]["usable"] or rows[name]["reasons"][0]["hint"]
    assert report["environment"]["protocol"] == "1.0"


def test_doctor_table(run, monkeypatch):
    monkeypatch.setattr(cli, "_OUT", cli.Console(width=200))
    code, out, _ = run("doctor", "--no-smoke")
    assert code == 0
    assert "torch" in out
    assert "environment" in out


def test_backends_json_holds_the_support_tables(run):
    code, out, _ = run("backends", "--json")
    assert code == 0
    table = {row["name"]: row for row in json.loads(out)}
    assert "float" not in json.dumps(table["torch"]["ops"]["flash_attention"]["dtypes"])
    assert table["torch"]["ops"]["flash_attention"]["gradient"] is True


def test_explain_json(run):
    code, out, _ = run(
        "explain", "flash_attention", "--device", "cpu", "--dtype", "fp32", "--json"
    )
    assert code == 0
    assert json.loads(out)["chosen"] == "torch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "flash_atention"), "did you mean 'flash_attention'"),
        (("explain", "flash_attention", "--dtype", "fp33"), "did you mean 'fp32'"),
        (("explain", "flash_attention", "--feature", "windo"), "did you mean 'window'"),
        (("explain", "flash_attention", "--backend", "tirton"), "did you mean 'triton'"),
        (("nonsense",), "No such command"),
        (("explain", "flash_attention", "--head-dim", "many"), "--head-dim"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.startswith("longctx: error: ")
    assert "Traceback" not in err
    assert err.strip().count("\n") == 0


def test_debug_shows_the_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "longctx", "--debug", "explain", "nothing"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_a_broken_joined_command_does_not_take_the_others_down(run, monkeypatch):
    class Broken:
        name = "broken"
        value = "broken:app"

        def load(self):
            raise ImportError("no such thing")

    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: [Broken()])
    code, _out, err = run("explain", "flash_attention", "--device", "cpu", "--json")
    assert code == 0
    assert "commands of broken:app are missing: no such thing" in err
