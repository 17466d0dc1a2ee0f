"""CUDA C++ kernels through NVRTC, called by its C interface: the library is all that is needed."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from longctx.testing.listings.kernel import (
    CompilerNotFoundError,
    KernelCompileError,
    compute_capability,
)
from longctx.testing.listings.listing import Listing
from longctx.testing.listings.ptxas import read_report
from longctx.testing.listings.toolkit import disassemble, find_include_folders, find_library

__all__ = ["CudaKernel", "missing_nvrtc"]


def missing_nvrtc() -> str:
    """Return what is not installed and how to install it; empty if all is there."""
    if find_library("nvrtc") is not None:
        return ""
    return "NVRTC is not installed: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"


@dataclass(frozen=True)
class CudaKernel:
    """A kernel in CUDA C++.

    Attributes
    ----------
    code : str
        The source.
    name : str
        The kernel, with template arguments if it has any: ``"flash_fwd<64, true>"``.
    options : tuple of str
        Options of NVRTC; architecture and the folders of CUDA's headers are added.
    dynamic_shared_bytes : int
        Shared memory that the launch asks for, in bytes.
    """

    code: str
    name: str
    options: tuple[str, ...] = ("-std=c++17",)
    dynamic_shared_bytes: int = 0

    @property
    def label(self) -> str:
        """The kernel's name with its template arguments."""
        return self.name

    def __str__(self) -> str:
        return self.label

    def compile(self, arch: str) -> Listing:
        """Compile for one architecture; see `Kernel.compile`."""
        compute_capability(arch)
        includes = [f"-I{folder}" for folder in find_include_folders()]
        options = [f"-arch={arch}", "-Xptxas", "-v", *self.options, *includes]
        ptx, cubin, log, entry = _compile(self.code, self.name, options)
        resources = read_report(log, entry)
        return Listing(
            kernel=self.label,
            arch=resources.arch,
            registers=resources.registers,
            spill_bytes=resources.spill_bytes,
            stack_bytes=resources.stack_bytes,
            shared_bytes=resources.shared_bytes + self.dynamic_shared_bytes,
            warnings=resources.warnings,
            ptx=ptx,
            sass=disassemble(cubin, entry),
        )


def _compile(code: str, name: str, options: list[str]) -> tuple[str, bytes, str, str]:
    """Return PTX, machine code, log, and the kernel's symbol."""
    library = _library()
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None
        )
    )
    try:
        _check(library.nvrtcAddNameExpression(program, name.encode()))
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), arguments)
        log = _bytes(program, "ProgramLog").rstrip(b"\0").decode()
        if status != 0:
            raise KernelCompileError(f"{_error_name(status)}\n{log}")
        symbol = ctypes.c_char_p()
        _check(library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol)))
        ptx = _bytes(program, "PTX").rstrip(b"\0").decode()
        return ptx, _bytes(program, "CUBIN"), log, (symbol.value or b"").decode()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


@functools.cache
def _library() -> Any:
    if reason := missing_nvrtc():
        raise CompilerNotFoundError(reason)
    library = ctypes.CDLL(find_library("nvrtc"))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _error_name(status: int) -> str:
    name: bytes = _library().nvrtcGetErrorString(status)
    return name.decode()


def _check(status: int) -> None:
    if status != 0:
        raise KernelCompileError(f"NVRTC failed with {_error_name(status)}")
