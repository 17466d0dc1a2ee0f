"""The built-in backend: every family in plain PyTorch, on any device."""
