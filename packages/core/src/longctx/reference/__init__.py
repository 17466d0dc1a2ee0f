"""The oracle: every family as a short, fp64-capable formula that materialises its masks."""
