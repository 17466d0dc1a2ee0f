"""``python -m longctx`` is the ``longctx`` command."""

from longctx.cli import main

main()
