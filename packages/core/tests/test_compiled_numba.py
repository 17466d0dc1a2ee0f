"""Numba kernels, compiled for both architectures without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.testing.listings import (
    KernelCompileError,
    NumbaKernel,
    assert_listing,
    compile_kernel,
    compile_kernels,
    needs_compiler,
    worker,
)

pytestmark = needs_compiler("numba")

KERNELS = Path(__file__).parent / "compiled_numba_kernels.py"


def test_options_of_the_decorator_hold():
    kernel = NumbaKernel(f"{KERNELS}:reversal_kernel", "void(float32[::1], float32[::1])", 96)
    for listing, arch in zip(compile_kernels([kernel]), ("sm_80", "sm_90a"), strict=True):
        assert_listing(listing, forbidden=["fp64", "local"])
        assert listing.arch == arch
        assert listing.shared_bytes == 256 * 4 + 96
        assert ".maxntid 256" in listing.ptx
        assert "NumbaEnv" not in listing.ptx  # link-time optimisation drops it


def test_double_precision_that_slips_in_is_caught():
    """A Python float is a float64 argument, and makes the arithmetic double."""
    slow = NumbaKernel(f"{KERNELS}:scale_kernel", "void(float32[::1], float64)")
    fast = NumbaKernel(f"{KERNELS}:scale_kernel", "void(float32[::1], float32)")
    assert_listing(compile_kernel(fast, "sm_80"), forbidden=["fp64"])
    with pytest.raises(AssertionError, match="fp64, which is forbidden"):
        assert_listing(compile_kernel(slow, "sm_80"), forbidden=["fp64"])


def test_local_arrays_are_caught():
    """The kernel is linked without link-time optimisation, by another road than the others."""
    kernel = NumbaKernel(f"{KERNELS}:local_array_kernel", "void(float32[::1], int32[::1])")
    for listing in compile_kernels([kernel]):
        assert listing.has("local")
        assert listing.has("atomic")
        assert (listing.spill_bytes, listing.stack_bytes) == (0, 800)
        assert listing.shared_bytes == 256
        assert listing.warnings == ()
        assert "NumbaEnv" in listing.ptx


def test_inline_ptx():
    kernel = NumbaKernel(f"{KERNELS}:fragment_product_kernel", "void(uint32[::1], float32[::1])")
    for listing in compile_kernels([kernel]):
        assert_listing(listing, expected=["mma"], forbidden=["fp64"])


def test_kernels_compile_while_this_process_simulates(monkeypatch):
    """Tests without a GPU run under NUMBA_ENABLE_CUDASIM=1, which no compiler may see."""
    worker._stop()
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    kernel = NumbaKernel(f"{KERNELS}:scale_kernel", "void(float32[::1], float32)")
    assert_listing(compile_kernel(kernel, "sm_80"))


@pytest.mark.parametrize(
    ("name", "signature", "message"),
    [
        ("scale_kernel", "void(float32, float32)", "TypingError"),
        ("scale_kernel", "void(nothing)", "NameError"),
        ("plain", "void()", "expected a function under @cuda.jit"),
    ],
)
def test_errors_name_the_kernel_and_what_the_compiler_said(name, signature, message):
    with pytest.raises(KernelCompileError) as failure:
        compile_kernel(NumbaKernel(f"{KERNELS}:{name}", signature), "sm_80")
    assert str(failure.value).startswith(f"{name}[{signature}] does not compile for sm_80: ")
    assert message in str(failure.value)
