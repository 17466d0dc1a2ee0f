"""Model architectures: plain PyTorch modules that leave attention to the caller."""
