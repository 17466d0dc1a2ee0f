"""longctx backend: Triton and Gluon kernels for NVIDIA GPUs (sm_80 and later)."""
