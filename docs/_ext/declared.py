"""What the code declares, as rows of tables: support of backends, benchmark scripts."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from pathlib import Path

from longctx import OpSupport, registry
from longctx.dispatch import KNOWN_BACKENDS
from longctx.protocols.backend import BackendInfo
from longctx.support import dtype_name

BENCHMARKS = Path(__file__).parents[2] / "packages/core/benchmarks"
COLUMNS = ("backend", "devices", "dtypes", "head sizes", "features", "gradient", "same bits")


def declared(info: BackendInfo) -> Mapping[str, OpSupport] | None:
    """Return a backend's tables, if possible also where it cannot run; None if it is not.

    The backends of this project keep their tables in a module ``support`` beside the plugin, which
    imports no GPU library.
    """
    loaded = registry().load_backend(info.name)
    if not isinstance(loaded, tuple):
        return loaded.support()
    package = info.load.__module__.rpartition(".")[0]
    try:
        tables: Mapping[str, OpSupport] = importlib.import_module(f"{package}.support").SUPPORT
    except (ImportError, AttributeError):
        return None
    return tables


def matrix(op: str) -> list[tuple[str, ...]]:
    """Return one row a backend: what it declares for an op, or why there is nothing to say."""
    rows: list[tuple[str, ...]] = []
    for name, info in registry().backends.items():
        tables = declared(info)
        if tables is None:
            rows.append((name, "cannot be loaded here"))
        elif op in tables:
            rows.append((name, *_cells(tables[op])))
        else:
            rows.append((name, "not declared"))
    rows.extend(
        (name, "not installed") for name in KNOWN_BACKENDS if name not in registry().backends
    )
    return rows


def _cells(support: OpSupport) -> tuple[str, ...]:
    devices = ", ".join(sorted(support.devices))
    for bound, word in ((support.min_arch, "from"), (support.max_arch, "up to")):
        if bound is not None:
            devices += f" {word} sm_{bound[0]}{bound[1]}"
    sizes = "any" if support.head_dims is None else ", ".join(map(str, sorted(support.head_dims)))
    return (
        devices,
        ", ".join(sorted(dtype_name(dtype) for dtype in support.dtypes)),
        sizes,
        ", ".join(sorted(support.features)) or "none",
        "yes" if support.gradient else "no",
        "yes" if support.deterministic else "no",
    )


def scripts() -> list[tuple[str, str]]:
    """Return the benchmark scripts, each with the first paragraph of its docstring."""
    rows = []
    for path in sorted(BENCHMARKS.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append((path.name, " ".join(text.split("\n\n")[0].split()).replace("`", "")))
    return rows
