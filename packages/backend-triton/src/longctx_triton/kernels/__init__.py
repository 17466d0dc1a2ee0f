"""Device code: what runs on the GPU, one file a kernel or a set of shared device functions."""
