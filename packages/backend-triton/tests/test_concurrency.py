"""Warp-specialised kernels under Triton's concurrency sanitizer: every access is ordered.

It follows copies of the copy engine to their mbarriers. Of ordinary asynchronous copies it knows
groups alone, and reports those that arrive at an mbarrier (MLA, token sets, the gradient's rows)
as pending for ever: these kernels are left out. Compiling a kernel for it takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]
KIT = Path(__file__).with_name("kit")
SECONDS = 400
CALLS = (
    "flash 64", "flash 128", "fp8", "window 128", "lists 128", "star 128", "stripes 64",
    "stripes 128",
)  # fmt: skip


def watched(tmp_path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the kit under the sanitizer, with a compile cache of its own."""
    return subprocess.run(
        [sys.executable, str(KIT / "under_consan.py"), str(KIT / script), *arguments],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "LONGCTX_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize("name", CALLS)
def test_every_access_is_ordered(name, tmp_path):
    done = watched(tmp_path, "small_calls.py", "--times", "3", name)
    assert done.returncode == 0, done.stdout[-2000:]
    assert f"{name}: right" in done.stdout


def test_a_hand_over_without_waiting_is_reported(tmp_path):
    assert watched(tmp_path, "planted_race.py", "right").returncode == 0
    done = watched(tmp_path, "planted_race.py", "planted")
    assert done.returncode != 0
    assert "outstanding" in done.stdout
