"""Compile kernels for architectures, and learn which compilers there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from longctx.errors import nearest_name
from longctx.testing.listings.kernel import Kernel
from longctx.testing.listings.listing import Listing
from longctx.testing.listings.numba_kernels import missing_numba
from longctx.testing.listings.nvrtc_kernels import missing_nvrtc
from longctx.testing.listings.triton_kernels import missing_triton
from longctx.testing.listings.worker import in_worker

if TYPE_CHECKING:
    import pytest

__all__ = ["ARCHITECTURES", "COMPILERS", "compile_kernel", "compile_kernels", "needs_compiler"]

ARCHITECTURES = ("sm_80", "sm_90a")
"""What every kernel is compiled for: A100, and H100 with its own instructions."""

COMPILERS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {"triton": missing_triton, "nvrtc": missing_nvrtc, "numba": missing_numba}
)
"""For every compiler, a function that returns what is not installed, or an empty string."""


def needs_compiler(name: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test, saying why, where a compiler is not installed.

    Parameters
    ----------
    name : str
        A name of `COMPILERS`.

    Raises
    ------
    ValueError
        There is no such compiler.
    """
    import pytest

    if name not in COMPILERS:
        raise ValueError(f"no compiler {name!r}; {nearest_name(name, COMPILERS)}")
    reason = COMPILERS[name]()
    return pytest.mark.skipif(bool(reason), reason=reason)


def compile_kernel(kernel: Kernel, arch: str) -> Listing:
    """Compile a kernel for one architecture; no GPU is needed.

    Parameters
    ----------
    kernel : Kernel
        A `TritonKernel`, `CudaKernel` or `NumbaKernel`, or any other picklable `Kernel`.
    arch : str
        Such as ``"sm_80"`` or ``"sm_90a"``.

    Raises
    ------
    CompilerNotFoundError
        The compiler is not installed; the message has the command that installs it.
    KernelCompileError
        The kernel does not compile, or the compiler crashed.
    """
    return in_worker(kernel, arch)


def compile_kernels(
    kernels: Iterable[Kernel], archs: Iterable[str] = ARCHITECTURES
) -> Iterator[Listing]:
    """Yield the listing of every kernel for every architecture; see `compile_kernel`."""
    archs = tuple(archs)
    for kernel in kernels:
        for arch in archs:
            yield compile_kernel(kernel, arch)
