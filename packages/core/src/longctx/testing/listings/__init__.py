"""Compile a backend's kernels without a GPU and check what the compilers made of them.

A kernel is described by a `TritonKernel`, `CudaKernel` or `NumbaKernel`; `compile_kernel` returns
its `Listing` for one architecture; `assert_listing` checks registers, spills, shared memory and
instructions.
"""

from longctx.testing.listings.compile import (
    ARCHITECTURES,
    COMPILERS,
    compile_kernel,
    compile_kernels,
    needs_compiler,
)
from longctx.testing.listings.instructions import INSTRUCTIONS, InstructionKind
from longctx.testing.listings.kernel import CompilerNotFoundError, Kernel, KernelCompileError
from longctx.testing.listings.listing import SHARED_LIMITS, Listing, assert_listing
from longctx.testing.listings.numba_kernels import NumbaKernel
from longctx.testing.listings.nvrtc_kernels import CudaKernel
from longctx.testing.listings.triton_kernels import TritonKernel

__all__ = [
    "ARCHITECTURES",
    "COMPILERS",
    "INSTRUCTIONS",
    "SHARED_LIMITS",
    "CompilerNotFoundError",
    "CudaKernel",
    "InstructionKind",
    "Kernel",
    "KernelCompileError",
    "Listing",
    "NumbaKernel",
    "TritonKernel",
    "assert_listing",
    "compile_kernel",
    "compile_kernels",
    "needs_compiler",
]
