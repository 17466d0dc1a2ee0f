"""Peak memory of a piece of work: CUDA's allocator, or the process's high-water mark on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"


@dataclass
class PeakMemory:
    """Filled in when the block of `peak_memory` ends.

    Attributes
    ----------
    nbytes : int or None
        Most memory held at once on top of what was held before; None where it cannot be measured.
    """

    nbytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the memory that a ``with`` block needs on top of what is held already.

    Parameters
    ----------
    device : torch.device
        CUDA: bytes of the caching allocator. Otherwise: resident bytes of the process (Linux).
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.nbytes = torch.cuda.max_memory_allocated(device) - before
        return
    resident = _reset_resident()
    yield peak
    if resident is not None:
        peak.nbytes = max(0, _resident("VmHWM") - resident)


def _reset_resident() -> int | None:
    """Set the high-water mark to what is resident now; return that, None where it cannot be."""
    if sys.platform != "linux":
        return None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # memory that was freed but kept by the allocator would hide what the block needs
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:  # some containers forbid it
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
