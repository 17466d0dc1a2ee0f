"""Numba CUDA kernels, linked by nvJitLink as Numba links them at run time."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longctx.testing.listings.kernel import (
    CompilerNotFoundError,
    KernelCompileError,
    compute_capability,
    load_object,
)
from longctx.testing.listings.listing import Listing
from longctx.testing.listings.ptxas import read_report
from longctx.testing.listings.toolkit import disassemble, is_installed

__all__ = ["NumbaKernel", "missing_numba"]

_COMPILE_OPTIONS = ("debug", "lineinfo", "fastmath", "opt", "launch_bounds")


def missing_numba() -> str:
    """Return what is not installed and how to install it; empty if all is there."""
    for module in ("numba_cuda", "cuda.bindings.nvjitlink"):
        if not is_installed(module):
            return f"Numba CUDA lacks {module}: pip install 'numba-cuda[cu13]'"
    return ""


@dataclass(frozen=True)
class NumbaKernel:
    """A Numba kernel with the types of one launch.

    Attributes
    ----------
    source : str
        ``"package.module:name"`` or ``"path/to/file.py:name"`` of the function under
        ``@cuda.jit``, whose options hold.
    signature : str
        Types of the arguments in Numba's words, such as ``"void(float32[:, ::1], int64)"``.
    dynamic_shared_bytes : int
        Shared memory that the launch asks for, in bytes.
    """

    source: str
    signature: str
    dynamic_shared_bytes: int = 0

    @property
    def label(self) -> str:
        """Name and signature."""
        return f"{self.source.rpartition(':')[2]}[{self.signature}]"

    def __str__(self) -> str:
        return self.label

    def compile(self, arch: str) -> Listing:
        """Compile for one architecture; see `Kernel.compile`."""
        if reason := missing_numba():
            raise CompilerNotFoundError(reason)
        from numba import cuda

        major, minor, suffix = compute_capability(arch)
        dispatcher = load_object(self.source)
        if not hasattr(dispatcher, "targetoptions"):
            raise KernelCompileError(
                f"{self.source!r} is a {type(dispatcher).__name__}; expected a function under "
                "@cuda.jit, in a process without NUMBA_ENABLE_CUDASIM"
            )
        options: Mapping[str, Any] = dispatcher.targetoptions
        if options.get("link"):
            raise KernelCompileError("the kernel links other files, which is not supported here")
        whole_program = bool(options.get("lto"))
        try:
            code, _ = cuda.compile(
                dispatcher.py_func,
                self.signature,
                device=False,
                abi="numba",
                cc=(major, minor, suffix) if suffix else (major, minor),
                output="ltoir" if whole_program else "ptx",
                **{name: options[name] for name in _COMPILE_OPTIONS if name in options},
            )
        except Exception as error:
            raise KernelCompileError(f"{type(error).__name__}: {error}") from error
        flags = [f"-arch={arch}", *(["-lto"] if whole_program else [])]
        if limit := options.get("max_registers"):
            flags.append(f"-maxrregcount={limit}")
        data = code.encode() if isinstance(code, str) else getattr(code, "code", code)
        cubin, log = _link(data, [*flags, "-Xptxas=-v"])
        ptx = _link(data, [*flags, "-ptx"])[0].decode() if whole_program else code
        entry = _entry(ptx)
        resources = read_report(log, entry)
        return Listing(
            kernel=self.label,
            arch=resources.arch,
            registers=resources.registers,
            spill_bytes=resources.spill_bytes,
            stack_bytes=resources.stack_bytes,
            shared_bytes=max(resources.shared_bytes, _declared_shared(ptx))
            + self.dynamic_shared_bytes,
            warnings=resources.warnings,
            ptx=ptx,
            sass=disassemble(cubin, entry),
        )


def _entry(ptx: str) -> str:
    """Return the symbol of the one kernel in Numba's PTX."""
    name = ptx.partition(".visible .entry ")[2].partition("(")[0].strip()
    if not name:
        raise KernelCompileError("Numba's PTX has no kernel")
    return name


def _declared_shared(ptx: str) -> int:
    """Return the bytes of static shared memory in PTX: a separate link does not report them."""
    return sum(int(size) for size in re.findall(r"\.shared .*\[(\d+)\];", ptx))


def _link(code: bytes, options: list[str]) -> tuple[bytes, str]:
    """Return what nvJitLink makes of LTO-IR or PTX (machine code, or PTX), and its report."""
    linker = importlib.import_module("cuda.bindings.nvjitlink")
    kind = linker.InputType.LTOIR if "-lto" in options else linker.InputType.PTX
    output = "linked_ptx" if "-ptx" in options else "linked_cubin"
    handle = linker.create(len(options), options)
    try:
        try:
            linker.add_data(handle, kind, code, len(code), "kernel")
            linker.complete(handle)
        except Exception as error:
            log = _read(linker, handle, "error_log").decode()
            raise KernelCompileError(f"{type(error).__name__}: {error}\n{log}") from error
        return _read(linker, handle, output), _read(linker, handle, "info_log").decode()
    finally:
        linker.destroy(handle)


def _read(linker: Any, handle: int, what: str) -> bytes:
    buffer = bytearray(getattr(linker, f"get_{what}_size")(handle))
    getattr(linker, f"get_{what}")(handle, buffer)
    return bytes(buffer).rstrip(b"\0") if what != "linked_cubin" else bytes(buffer)
