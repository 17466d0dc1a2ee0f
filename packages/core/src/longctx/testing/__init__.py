"""Tools to test backends with: a tolerance that comes from the data."""
