"""Triton and Gluon kernels, compiled for both architectures without a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from longctx.testing.listings import (
    KernelCompileError,
    TritonKernel,
    assert_listing,
    compile_kernel,
    compile_kernels,
    needs_compiler,
    worker,
)

pytestmark = needs_compiler("triton")

HERE = Path(__file__).parent
KERNELS = HERE / "compiled_triton_kernels.py"
ALIGNED = {
    **dict.fromkeys(("a", "b"), "*bf16:16"),
    "c": "*fp32:16",
    **dict.fromkeys(("K", "stride_a", "stride_b", "stride_c"), "i32:16"),
}
MATMUL = TritonKernel(f"{KERNELS}:matmul_kernel", ALIGNED, {"BM": 64, "BN": 64})
COPY = TritonKernel(
    f"{KERNELS}:copy_kernel", {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"EVEN": True}
)


def test_a_dot_is_mma_on_sm_80_and_wgmma_on_sm_90():
    """BK keeps its default; the code is that of the architecture asked for."""
    ampere, hopper = compile_kernels([MATMUL])
    assert (ampere.arch, hopper.arch) == ("sm_80", "sm_90a")
    assert_listing(ampere, expected=["mma", "cp.async", "ldmatrix"], forbidden=["wgmma", "tma"])
    assert_listing(hopper, expected=["wgmma", "cp.async"], forbidden=["mma", "fp64"])
    for listing, target in ((ampere, "sm_80"), (hopper, "sm_90a")):
        assert f".target {target}" in listing.ptx
        assert listing.registers > 32
        assert listing.shared_bytes >= 2 * 64 * 32 * 2


def test_an_unmet_expectation_names_kernel_architecture_and_findings():
    with pytest.raises(AssertionError) as failure:
        assert_listing(compile_kernel(MATMUL, "sm_80"), expected=("wgmma",))
    text = str(failure.value)
    assert text.startswith("matmul_kernel[BM=64,BN=64,warps=4,stages=3] for sm_80:\n")
    assert "no wgmma, which is expected" in text
    assert "mma 16" in text


def test_copies_need_to_know_that_pointers_and_strides_are_aligned():
    unknown = {name: kind.removesuffix(":16") for name, kind in ALIGNED.items()}
    for listing in compile_kernels([dataclasses.replace(MATMUL, signature=unknown)]):
        assert_listing(listing, forbidden=["cp.async"])


def test_spills_are_caught():
    """64 KiB of accumulators do not fit into 8 warps of 48 registers."""
    starved = dataclasses.replace(
        MATMUL, constexprs={"BM": 128, "BN": 128}, num_warps=8, options={"maxnreg": 48}
    )
    listing = compile_kernel(starved, "sm_80")
    assert listing.registers <= 48
    assert listing.has("local")
    with pytest.raises(AssertionError, match="bytes of spills, at most 0 allowed"):
        assert_listing(listing)


def test_serialised_wgmma_is_caught():
    """256 accumulators a thread leave none for the operands: the assembler says so."""
    listing = compile_kernel(
        dataclasses.replace(MATMUL, constexprs={"BM": 128, "BN": 256}), "sm_90a"
    )
    with pytest.raises(AssertionError, match=r"assembler warning: .*wgmma.* serialized"):
        assert_listing(listing, max_spill_bytes=listing.spill_bytes)


def test_descriptors_are_tma_on_sm_90_and_pointers_before():
    kernel = TritonKernel(
        f"{KERNELS}:descriptor_matmul_kernel",
        {
            "a": "tensordesc<bf16[64,64]>",
            "b": "tensordesc<bf16[64,64]>",
            "c": "tensordesc<fp32[64,64]>",
            "K": "i32",
        },
        {"BM": 64, "BN": 64, "BK": 64},
    )
    ampere, hopper = compile_kernels([kernel])
    assert ampere.has("mma")
    assert not ampere.has("tma")
    assert_listing(hopper, expected=["wgmma", "tma"])


def test_gluon():
    kernel = TritonKernel(
        f"{HERE / 'compiled_gluon_kernels.py'}:product_kernel",
        {"a": "tensordesc<bf16[64,64]>", "b": "tensordesc<bf16[64,128]>", "out": "*fp32:16"},
        {"M": 64, "N": 128, "K": 64},
    )
    listing = assert_listing(compile_kernel(kernel, "sm_90a"), expected=["wgmma", "tma"])
    assert listing.count("wgmma") == 4  # K of 64 in steps of 16
    assert listing.shared_bytes >= (64 * 64 + 64 * 128) * 2


def test_heuristics_are_taken_off_and_the_cache_does_not_matter():
    first, second = (compile_kernel(COPY, "sm_80") for _ in range(2))
    assert first == second
    assert first.registers < 32


def test_kernels_compile_while_this_process_interprets(monkeypatch):
    """Tests without a GPU run under TRITON_INTERPRET=1, which no compiler may see."""
    worker._stop()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_listing(compile_kernel(COPY, "sm_80"))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (dataclasses.replace(COPY, constexprs={}), "'EVEN' has neither a type nor a value"),
        (dataclasses.replace(COPY, constexprs={"EVEN": 1, "ODD": 1}), "has no argument ODD"),
        (TritonKernel(f"{KERNELS}:plain", {}), "expected a function under @triton.jit"),
        (TritonKernel(f"{KERNELS}:wrong_kernel", {"x": "*fp32"}), "no_such_function"),
        (TritonKernel(f"{KERNELS}:nothing", {}), "cannot be loaded"),
        (dataclasses.replace(MATMUL, options={"maxnreg": 24}), "Insufficient registers"),
    ],
    ids=["missing", "unknown", "plain", "wrong", "nothing", "assembler"],
)
def test_errors_name_the_kernel_and_what_the_compiler_said(kernel, message):
    with pytest.raises(KernelCompileError) as failure:
        compile_kernel(kernel, "sm_90a")
    text = str(failure.value)
    assert text.startswith(f"{kernel.label} does not compile for sm_90a: ")
    assert message in text
