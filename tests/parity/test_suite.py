"""The conformance suite over every backend that is usable here."""

from longctx.testing.suite import *  # noqa: F403
