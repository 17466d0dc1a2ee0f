"""CUDA C++ kernels through NVRTC, compiled for both architectures without a GPU."""

from __future__ import annotations

import pytest

from longctx.testing.listings import (
    CudaKernel,
    KernelCompileError,
    assert_listing,
    compile_kernel,
    compile_kernels,
    needs_compiler,
)

pytestmark = needs_compiler("nvrtc")

CODE = r"""
extern "C" __global__ void fragment_product(const unsigned* a, float* c) {
  float d[4] = {0, 0, 0, 0};
  __shared__ __align__(16) unsigned tile[300];
  unsigned to = (unsigned)__cvta_generic_to_shared(tile);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(a) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(tile[0]), "r"(tile[1]), "r"(tile[2]), "r"(tile[3]), "r"(a[4]), "r"(a[5]));
  c[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}

template <int N, bool ATOMIC>
__global__ void pick(const float* x, float* y, int place) {
  float kept[N];
  for (int i = 0; i < N; i++) kept[i] = x[i] * x[i + 1];
  float sum = 0;
  for (int i = 0; i < place; i++) sum += kept[7 * i % N];
  if (ATOMIC) atomicAdd(y, sum);
  else y[0] = sum;
}

#ifdef HOPPER
extern "C" __global__ void __launch_bounds__(256, 1) warpgroups(float* out) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  unsigned long long tile = (unsigned long long)__cvta_generic_to_shared(tiles) >> 4;
  float d0 = 0, d1 = 0, d2 = 0, d3 = 0;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    asm volatile("wgmma.fence.sync.aligned;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3}, %4, %4, 1, 1, 1, 0, 0;\n"
                 "wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;"
                 : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3) : "l"(tile));
    out[threadIdx.x] = d0 + d1 + d2 + d3;
  }
}
#endif
"""


def test_instructions_and_shared_memory():
    for listing in compile_kernels([CudaKernel(CODE, "fragment_product")]):
        assert_listing(listing, expected=["mma", "cp.async"], forbidden=["wgmma", "local"])
        assert listing.count("mma") == 1
        assert listing.shared_bytes == 1200
        assert ".entry fragment_product" in listing.ptx


def test_dynamic_shared_memory_is_added():
    kernel = CudaKernel(CODE, "fragment_product", dynamic_shared_bytes=170_000)
    ampere, hopper = compile_kernels([kernel])
    assert ampere.shared_bytes == hopper.shared_bytes == 171_200
    assert_listing(hopper)
    with pytest.raises(AssertionError, match="171200 bytes of shared memory, at most 166912"):
        assert_listing(ampere)


def test_hopper_instructions_need_its_own_target():
    kernel = CudaKernel(CODE, "warpgroups", options=("-std=c++17", "-DHOPPER"))
    assert_listing(compile_kernel(kernel, "sm_90a"), expected=["wgmma", "setmaxnreg"])
    with pytest.raises(KernelCompileError, match=r"(?s)warpgroups does not .* 'wgmma.*' not supp"):
        compile_kernel(kernel, "sm_90")


@pytest.mark.parametrize(("n", "atomic"), [(40, True), (25, False)])
def test_template_arguments_choose_the_kernel(n, atomic):
    """An array that is indexed at run time is local memory, though no register is spilled."""
    kernel = CudaKernel(CODE, f"pick<{n}, {str(atomic).lower()}>")
    for listing in compile_kernels([kernel]):
        assert listing.has("atomic") == atomic
        assert listing.has("local")
        assert listing.spill_bytes == 0
        assert listing.stack_bytes == -(-4 * n // 8) * 8
        with pytest.raises(AssertionError, match="bytes of stack, at most 0 allowed"):
            assert_listing(listing)


def test_what_the_compiler_says_is_in_the_error():
    with pytest.raises(KernelCompileError, match=r'absent does not .*\n.*"absent" is undefined'):
        compile_kernel(CudaKernel(CODE, "absent"), "sm_80")
    with pytest.raises(KernelCompileError, match=r'(?s)kernel\.cu.* identifier "x" is undefined'):
        compile_kernel(CudaKernel("__global__ void f() { x(); }", "f"), "sm_80")
