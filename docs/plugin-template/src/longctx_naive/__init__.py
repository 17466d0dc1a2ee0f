"""A third-party longctx backend."""
