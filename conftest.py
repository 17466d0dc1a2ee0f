"""Run the Python snippets of the documentation: one test a page, for a page is one namespace."""

from __future__ import annotations

import contextlib
import doctest
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent
collect_ignore = ["docs/_build"]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Page | None:
    """Collect the pages under ``docs/`` and the README.md of the repository and its packages."""
    inside = file_path.relative_to(ROOT).parts if file_path.is_relative_to(ROOT) else ()
    readme = file_path.name == "README.md" and (len(inside) == 1 or inside[:1] == ("packages",))
    if file_path.suffix == ".md" and (readme or inside[:1] == ("docs",)):
        page: Page = Page.from_parent(parent, path=file_path)
        return page
    return None


class Page(pytest.File):
    """A Markdown page; it holds one test when it has Python blocks."""

    def collect(self) -> Iterable[pytest.Item]:
        """Yield the page's one test."""
        if "```python" in self.path.read_text(encoding="utf-8"):
            yield Snippets.from_parent(self, name="snippets")


class Snippets(pytest.Item):
    """All Python blocks of a page, in order and in one namespace."""

    def runtest(self) -> None:
        """Evaluate the blocks in an empty folder, with no variable of ours set."""
        sybil = pytest.importorskip("sybil")
        from sybil.parsers.myst import PythonCodeBlockParser

        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        document = sybil.Sybil([PythonCodeBlockParser(doctest_optionflags=flags)]).parse(self.path)
        with tempfile.TemporaryDirectory() as folder, _untouched(), contextlib.chdir(folder):
            for example in document.examples():
                example.evaluate()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Return a doctest's comparison, or the traceback from the page's own line on."""
        from sybil.example import SybilFailure

        if isinstance(excinfo.value, SybilFailure):
            return str(excinfo.value)
        excinfo.traceback = excinfo.traceback.cut(path=self.path)
        return str(excinfo.getrepr(style="short"))

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return the page as the place of the test."""
        return self.path, 0, f"snippets of {self.path.name}"


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    """Undo what a page does to the process: environment, registered plugins, random state."""
    import torch

    import longctx
    from longctx import plugins

    environment = dict(os.environ)
    registered = list(plugins._extra_plugins)
    for name in [name for name in os.environ if name.startswith("LONGCTX_")]:
        del os.environ[name]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if plugins._extra_plugins != registered:
            plugins._extra_plugins[:] = registered
            longctx.reset_registry()
