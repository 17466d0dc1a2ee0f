"""Numba kernels whose listings the tests know; compiled by path, never imported by a test."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic


@cuda.jit(fastmath=True, launch_bounds=256)
def reversal_kernel(x, y):
    s_x = cuda.shared.array(256, np.float32)
    i_t = cuda.threadIdx.x
    s_x[i_t] = x[i_t]
    cuda.syncthreads()
    y[i_t] = s_x[255 - i_t]


@cuda.jit
def scale_kernel(x, factor):
    i_t = cuda.grid(1)
    x[i_t] = x[i_t] * factor


def local_array(x, places):
    s_x = cuda.shared.array(64, np.float32)
    b_x = cuda.local.array(200, np.float32)
    for i in range(200):
        b_x[i] = x[i] + np.float32(1)
    s_x[cuda.threadIdx.x] = b_x[places[0]]
    cuda.syncthreads()
    cuda.atomic.add(x, 0, s_x[places[1]])


# as a decorator with arguments, cuda.jit loses lto
local_array_kernel = cuda.jit(local_array, lto=False)


@intrinsic
def fragment_product(typing, a, b):
    """Multiply a fragment that is `a` everywhere by one that is `b` everywhere."""
    result = types.float32(types.uint32, types.uint32)

    def generate(context, builder, signature, arguments):
        floats = ir.LiteralStructType([ir.FloatType()] * 4)
        function = ir.FunctionType(floats, [ir.IntType(32)] * 2)
        code = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, "
            "{$4,$4,$4,$4}, {$5,$5}, {0f00000000,0f00000000,0f00000000,0f00000000};"
        )
        assembly = ir.InlineAsm(function, code, "=f,=f,=f,=f,r,r", side_effect=True)
        return builder.extract_value(builder.call(assembly, arguments), 0)

    return result, generate


@cuda.jit
def fragment_product_kernel(x, y):
    i_t = cuda.threadIdx.x
    y[i_t] = fragment_product(x[i_t], x[i_t + 1])


plain = 3
