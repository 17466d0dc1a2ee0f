"""The built-in backend: every family in plain PyTorch, on any device; the default without a GPU."""
