"""The GPU that a call runs on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx.settings import is_set

__all__ = ["SMALL_SHARED", "Device", "current_gpu", "device_of", "launched", "on_device"]

_HERE = nullcontext()
_devices: dict[torch.device, Device] = {}
SMALL_SHARED = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})
"""Architectures with about 100 KiB of shared memory a block."""


class Device(NamedTuple):
    """What the choice of tiles depends on.

    Attributes
    ----------
    arch : (int, int)
        Compute capability; (0, 0) for Triton's interpreter on the CPU.
    processors : int
        Streaming multiprocessors; 8 for the interpreter, so that work is divided there, too.
    l2 : int
        Bytes of L2 cache.
    """

    arch: tuple[int, int]
    processors: int
    l2: int

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter."""
        return self.arch == (0, 0)

    @property
    def large_shared(self) -> bool:
        """Whether a block may take 160 KiB of shared memory or more, not about 100."""
        return self.arch not in SMALL_SHARED

    @property
    def runs_gluon(self) -> bool:
        """Whether Hopper's own kernels of exact attention run.

        ``LONGCTX_TRITON_FLASH=portable`` in the environment turns to those of ``tl.dot``.
        """
        if self.arch != (9, 0):
            return False
        name = "LONGCTX_TRITON_FLASH"
        return not is_set(name) or os.environ[name].strip().lower() != "portable"


def device_of(device: torch.device) -> Device:
    """Return the properties of a device, remembered after the first call."""
    found = _devices.get(device)
    if found is not None:
        return found
    if device.type != "cuda":
        return Device((0, 0), 8, 0)
    found = _cuda_device(torch.cuda.current_device() if device.index is None else device.index)
    if device.index is not None:
        _devices[device] = found
    return found


def _cuda_device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device((found.major, found.minor), found.multi_processor_count, found.L2_cache_size)


def current_gpu() -> str:
    """Return the name of the GPU that is current; empty as long as no CUDA device is in use."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    # to ask for the current device would start CUDA
    return _gpu_name(torch.cuda.current_device()) if started else ""


@cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the tensor's GPU is current, as Triton's launches need it."""
    index = tensor.get_device()
    if index < 0 or not tensor.is_cuda or index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(index)


def launched(primitive: Callable[..., Any]) -> Callable[..., Any]:
    """Return a primitive that runs with its first tensor's GPU current."""

    @wraps(primitive)
    def launch(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        # `on_device` for the usual case, without a context
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return primitive(first, *args, **kwargs)
        with on_device(first):
            return primitive(first, *args, **kwargs)

    return launch
