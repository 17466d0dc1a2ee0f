"""The conformance suite: classes of tests by op, run for every backend under test.

``pytest --pyargs longctx.testing.suite --longctx-backend NAME`` runs it; a third party's own test
file needs ``from longctx.testing.suite import *`` and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil

__all__: list[str] = []

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    _tests = importlib.import_module(f"{__name__}.{_module}")
    for _name in _tests.__all__:
        assert _name not in __all__, f"two classes of the suite are called {_name}"
        globals()[_name] = getattr(_tests, _name)
        __all__.append(_name)
