"""Triton kernels whose listings the tests know; compiled by path, never imported by a test."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a, b, c, K, stride_a, stride_b, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr = 32,
):  # fmt: skip
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    # [BM, BN]
    b_c = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        # [BM, BK]
        b_a = tl.load(a + o_m[:, None] * stride_a + o_k[None, :])
        # [BK, BN]
        b_b = tl.load(b + o_k[:, None] * stride_b + o_n[None, :])
        b_c = tl.dot(b_a, b_b, b_c)
    tl.store(c + o_m[:, None] * stride_c + o_n[None, :], b_c)


@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % 64 == 0})
@triton.jit
def copy_kernel(x, y, n, EVEN: tl.constexpr):
    o_n = tl.arange(0, 64)
    if EVEN:
        tl.store(y + o_n, tl.load(x + o_n))
    else:
        tl.store(y + o_n, tl.load(x + o_n, mask=o_n < n), mask=o_n < n)


@triton.jit
def descriptor_matmul_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    # [BM, BN]
    b_c = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, K, BK):
        b_a = a.load([tl.program_id(0) * BM, i_k])
        b_b = b.load([i_k, tl.program_id(1) * BN])
        b_c = tl.dot(b_a, b_b, b_c)
    c.store([tl.program_id(0) * BM, tl.program_id(1) * BN], b_c)


@triton.jit
def wrong_kernel(x):
    tl.store(x, tl.no_such_function(x))


plain = 3
