"""longctx backend: CUDA C++ kernels compiled at run time through CuPy and NVRTC."""
