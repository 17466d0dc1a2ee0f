"""A recorder of what primitives launch on tensors without data.

The primitives run on meta tensors, as if on one of `DEVICES`, with their kernels replaced by
recorders. So tiles, constants, warps, stages and the alignment of every argument are those of a
real launch, and none is repeated here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.testing.listings import TritonKernel
from longctx_triton import kernels
from longctx_triton.launch.device import Device

__all__ = ["DEVICES", "backend_kernels", "recording"]

DEVICES = {
    "sm_80": Device((8, 0), 108, 40 << 20),
    "sm_89": Device((8, 9), 128, 72 << 20),
    "sm_90a": Device((9, 0), 132, 50 << 20),
}
"""A100, L40 and H100."""

GPUS = {(9, 0): "NVIDIA H100 80GB HBM3"}
"""Whose tuned tiles are launched, by architecture; the others take the code's own."""

OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any, found: list[TritonKernel]) -> None:
        self.function = inspect.unwrap(kernel.fn)
        # a kernel for the interpreter keeps its options apart
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        self.not_specialized = options["do_not_specialize"] or ()
        self.found = found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < extent < 2**31 for extent in grid), grid
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Keep the launch unless one like it is there."""
        options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        bound = inspect.signature(self.function).bind(*args, **kwargs).arguments
        parameters = inspect.signature(self.function).parameters
        signature, constants = {}, {}
        for name, value in bound.items():
            constant = "constexpr" in str(parameters[name].annotation)
            specialized = name not in self.not_specialized
            if constant or value is None or (type(value) is int and value == 1 and specialized):
                constants[name] = value
            else:
                signature[name] = argument_type(value, specialized)
        kernel = TritonKernel(
            f"{self.function.__module__}:{self.function.__name__}",
            signature,
            constants,
            num_warps=options.pop("num_warps", 4),
            num_stages=options.pop("num_stages", 3),
            options=options,
        )
        if kernel not in self.found:
            self.found.append(kernel)


def argument_type(value: Any, specialized: bool) -> str:
    """Return the type that Triton gives an argument, with ``:16`` for a multiple of 16."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}{':16' if value.data_ptr() % 16 == 0 else ''}"
    if isinstance(value, int):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return f"{kind}:16" if specialized and value % 16 == 0 else kind
    if isinstance(value, float):
        return "fp32"
    block = ", ".join(str(size) for size in value.block_shape)
    return f"tensordesc<{TYPES[value.base.dtype]}[{block}],{value.layout!r}>"


def backend_modules() -> list[ModuleType]:
    """Return the modules of the backend that are loaded."""
    return [module for name, module in sys.modules.items() if name.startswith("longctx_triton.")]


@cache
def backend_kernels() -> dict[str, Any]:
    """Return every kernel under ``longctx_triton.kernels`` by its name."""
    names = (found.name for found in pkgutil.iter_modules(kernels.__path__))
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }


@contextmanager
def recording(device: Device) -> Iterator[list[TritonKernel]]:
    """Replace kernels and device; yield the list that launches are added to."""
    found: list[TritonKernel] = []
    instead: dict[str, Any] = {
        name: Recorder(kernel, found) for name, kernel in backend_kernels().items()
    }
    instead["device_of"] = lambda _: device
    instead["current_gpu"] = lambda: GPUS.get(device.arch, "")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LONGCTX_TRITON_FLASH", "LONGCTX_TRITON_INDEXER"):
            patch.delenv(name, raising=False)
        patch.setenv("LONGCTX_INDEX_BUDGET_MIB", "64")
        patch.setattr(Tensor, "is_cuda", True)
        # views of one tensor share their address, other tensors do not
        patch.setattr(
            Tensor,
            "data_ptr",
            lambda t: 16 * t.untyped_storage()._cdata + t.storage_offset() * t.itemsize,
        )
        for module in backend_modules():
            for name in instead.keys() & vars(module).keys():
                patch.setattr(module, name, instead[name])
        yield found
