"""Memory of a stream's kernels: partial results, and counters that are 0 between kernels.

A kernel that counts its programs leaves its counters at 0 for the next one, so that none has to be
cleared before a launch. Kernels of one stream run one after another and share both.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_triton.launch.direct import raw_stream

__all__ = ["Workspace", "workspace"]

COUNTERS = 1 << 18
"""Of one allocation: 1 MiB."""
LEAST_COUNTERS = 1024
"""Of a stream."""
ALIGNMENT = 4
"""Counters in 16 bytes, at whose multiples those of a stream begin."""


class Workspace(NamedTuple):
    """What kernels of one stream, or of one place in a CUDA graph, may use.

    Attributes
    ----------
    counters : Tensor
        int32, all 0 whenever no kernel is running.
    numbers : Tensor
        fp32, with anything in it.
    """

    counters: Tensor
    numbers: Tensor


_of_streams: dict[tuple[int, int], Workspace] = {}


def workspace(counters: int, numbers: int, device: torch.device) -> Workspace:
    """Return at least so many counters and numbers for the stream that is current.

    A call that is captured into a CUDA graph gets counters of its own, which stay the graph's:
    its replays may run beside each other's and beside the stream. Only the first call on a GPU
    waits for it.
    """
    if device.type != "cuda":
        zeros = torch.zeros(counters, dtype=torch.int32, device=device)
        return Workspace(zeros, torch.empty(numbers, dtype=torch.float32, device=device))
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        own = _store(index).take(counters, device)
        return Workspace(own, torch.empty(numbers, dtype=torch.float32, device=device))
    stream = (index, raw_stream(index))
    found = _of_streams.get(stream)
    if found is None or len(found.counters) < counters or len(found.numbers) < numbers:
        if found is not None and len(found.counters) >= counters:
            zeros = found.counters
        else:
            zeros = _store(index).take(max(counters, LEAST_COUNTERS), device)
        if found is not None:
            numbers = max(numbers, len(found.numbers))
        found = Workspace(zeros, torch.empty(numbers, dtype=torch.float32, device=device))
        _of_streams[stream] = found
    return found


class _Store:
    """What is left of the counters of one GPU."""

    def __init__(self) -> None:
        self.free: Tensor | None = None
        self.lock = threading.Lock()

    def take(self, count: int, device: torch.device) -> Tensor:
        """Return counters that nobody else has."""
        count = -(-count // ALIGNMENT) * ALIGNMENT
        with self.lock:
            if self.free is None or len(self.free) < count:
                if torch.cuda.is_current_stream_capturing():
                    # the graph clears its own
                    return torch.zeros(count, dtype=torch.int32, device=device)
                self.free = torch.zeros(max(count, COUNTERS), dtype=torch.int32, device=device)
                # streams and graphs that take some later do not wait for this stream
                torch.cuda.current_stream(device).synchronize()
            taken, self.free = self.free[:count], self.free[count:]
        return taken


@cache
def _store(device: int) -> _Store:
    return _Store()
