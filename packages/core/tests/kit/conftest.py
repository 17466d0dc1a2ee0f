"""Runs the conformance kit in a process of its own and reads its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITE = Path(__file__).parents[2] / "src" / "longctx" / "testing" / "suite"


@dataclass(frozen=True)
class KitRun:
    """What a run of the kit printed and wrote."""

    status: int
    output: str
    table: dict

    def rows(self, backend):
        """Return the table's rows of a backend."""
        return [row for row in self.table["results"] if row["backend"] == backend]

    def count(self, backend, outcome):
        """Return how many tests of a backend ended so."""
        return sum(row[outcome] for row in self.rows(backend))


@pytest.fixture(scope="session")
def run_kit(tmp_path_factory):
    """Return a function that runs the suite with a plugin module of this folder."""

    def run(plugin, *arguments, file="."):
        path = tmp_path_factory.mktemp("kit") / "table.json"
        environment = {
            **os.environ,
            "LONGCTX_PLUGINS": plugin,
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
        }
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--longctx-json={path}"]
        command = [sys.executable, "-m", "pytest", str(SUITE / file), *options, *arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            cwd=HERE,
            check=False,
        )
        table = json.loads(path.read_text()) if path.exists() else {"results": []}
        return KitRun(done.returncode, done.stdout + done.stderr, table)

    return run
