"""The conformance suite: one class of tests an op, run for every backend under test.

``pytest --pyargs longctx.testing.suite --longctx-backend NAME`` runs it; a third party's own test
file needs ``from longctx.testing.suite import *`` and nothing else.
"""

from longctx.testing.suite.test_cases import *  # noqa: F403
