"""The protocols that backends, caches and selectors implement; docstrings with shapes, no logic."""
