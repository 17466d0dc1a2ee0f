"""A plugin whose import fails, as one does whose driver library is missing."""

raise OSError("libmissing.so.7: cannot open shared object file")
