"""Cheap looks at the machine for `BackendInfo.missing`: library, driver, GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from dataclasses import dataclass

import torch

from longctx.support import Reason, ReasonCode

__all__ = [
    "CudaDriver",
    "cuda_driver",
    "distribution_version",
    "missing_cuda",
    "missing_library",
]


@dataclass(frozen=True, slots=True)
class CudaDriver:
    """What the CUDA driver library says of itself.

    Attributes
    ----------
    found : bool
        Whether the library could be opened.
    version : (int, int) or None
        Newest CUDA version that the driver supports.
    devices : int
        Number of GPUs.
    error : str
        What failed; empty when all went well.
    """

    found: bool
    version: tuple[int, int] | None = None
    devices: int = 0
    error: str = ""


@functools.lru_cache(maxsize=1)
def cuda_driver() -> CudaDriver:
    """Ask the CUDA driver for its version and number of devices, without creating a context."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return CudaDriver(False, error=f"{name} was not found")
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return CudaDriver(True, error="the driver does not tell its version")
    version = (number.value // 1000, number.value % 1000 // 10)
    status = driver.cuInit(0)
    if status != 0:
        return CudaDriver(True, version, error=f"cuInit failed with code {status}")
    driver.cuDeviceGetCount(ctypes.byref(number))
    return CudaDriver(True, version, number.value)


def distribution_version(name: str) -> str:
    """Return the version of an installed distribution, ``"0+unknown"`` in a bare source tree.

    Examples
    --------
    >>> from longctx.probes import distribution_version
    >>> distribution_version("no-such-distribution")
    '0+unknown'
    """
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "0+unknown"


def missing_library(module: str, command: str) -> tuple[Reason, ...]:
    """Return a reason if a module is not installed; it is not imported.

    Parameters
    ----------
    module : str
        Import name, such as ``"triton"``.
    command : str
        How to install it.
    """
    if importlib.util.find_spec(module) is not None:
        return ()
    return (Reason(ReasonCode.NOT_INSTALLED, f"the library {module} is not installed", command),)


def missing_cuda() -> tuple[Reason, ...]:
    """Return what keeps CUDA kernels from running here: driver, GPU, or a torch without CUDA."""
    found: list[Reason] = []
    driver = cuda_driver()
    if not driver.found:
        found.append(
            Reason(
                ReasonCode.NO_DEVICE,
                f"no NVIDIA driver: {driver.error}",
                "install the NVIDIA driver, or run on a machine that has a GPU",
            )
        )
    elif driver.devices == 0:
        why = f" ({driver.error})" if driver.error else ""
        found.append(
            Reason(
                ReasonCode.NO_DEVICE,
                f"the NVIDIA driver sees no GPU{why}",
                "check nvidia-smi and CUDA_VISIBLE_DEVICES",
            )
        )
    if torch.version.cuda is None:
        found.append(
            Reason(
                ReasonCode.NOT_INSTALLED,
                f"torch {torch.__version__} was built without CUDA",
                "install a CUDA build of torch",
            )
        )
    return tuple(found)
