"""The whole conformance suite, on this backend."""

from longctx.testing.suite import *  # noqa: F403
