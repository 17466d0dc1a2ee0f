"""longctx backend: Numba CUDA kernels: the readable backend."""
