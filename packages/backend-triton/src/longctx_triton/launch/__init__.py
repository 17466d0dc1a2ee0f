"""Host code between a primitive and its kernels: tile sizes, splits, launches of several steps."""
