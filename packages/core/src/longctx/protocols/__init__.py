"""The protocols that backends, caches and selectors implement: signatures and docstrings."""
