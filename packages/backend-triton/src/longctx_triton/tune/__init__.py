"""Search for faster tiles on the GPU at hand: ``longctx tune``."""
