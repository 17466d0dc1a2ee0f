"""Where a run took place: device, driver, versions, commit."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from longctx.probes import cuda_driver

__all__ = ["describe_machine", "device_name"]

_DISTRIBUTIONS = {"longctx": "longctx-core", "triton": "triton", "numpy": "numpy"}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what a figure must be read with; only values that JSON can hold.

    Parameters
    ----------
    device : torch.device
        Where the run takes place.

    Returns
    -------
    dict
        ``device``, ``driver`` and ``cuda`` (None on a CPU), ``threads``, ``python``, ``torch``,
        the versions of installed distributions, ``commit`` (None outside of a git checkout, with
        ``+`` when files were changed) and ``date``.
    """
    gpu = device.type == "cuda"
    return {
        "device_type": device.type,
        "device": device_name(device),
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(dist) for name, dist in _DISTRIBUTIONS.items()},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi"):
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        answer = _ask(query, Path.cwd())
        if answer:
            return answer.splitlines()[0].strip()
    found = cuda_driver().version
    return None if found is None else f"CUDA {found[0]}.{found[1]}"


def _commit() -> str | None:
    """Return the commit of the checkout that longctx was imported from."""
    folder = Path(__file__).parent
    if _ask(("git", "ls-files", "--error-unmatch", "../__init__.py"), folder) is None:
        return None  # installed: a repository around site-packages is not longctx's
    commit = _ask(("git", "rev-parse", "HEAD"), folder)
    changed = _ask(("git", "status", "--porcelain", "--untracked-files=no", ".."), folder)
    return f"{commit}+" if commit and changed else commit


def _ask(command: Sequence[str], folder: Path) -> str | None:
    """Return what a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
