"""The standard shapes of every op, on a GPU and on a CPU, and those of single calls."""

from __future__ import annotations

from collections.abc import Sequence

from longctx.bench.case import Case
from longctx.bench.shapes import calls, cpu, dense, sparse
from longctx.errors import nearest_name
from longctx.protocols.families import OPS

__all__ = ["standard_cases"]


def standard_cases(
    ops: Sequence[str],
    *,
    device: str,
    backward: bool = False,
    dtype: str | None = None,
    shapes: str = "",
) -> list[Case]:
    """Return the cases of some ops on a kind of device, in the order of the ops.

    Parameters
    ----------
    ops : sequence of str
        Public op names.
    device : {"cpu", "cuda"}
        A CPU gets grids that take seconds; the small shapes of single calls are the same.
    backward : bool
        The backward shapes instead of the forward ones.
    dtype : str, optional
        Short name of the data type that replaces the cases' own.
    shapes : str
        Words as `Case.matches` takes them. A shape that several grids have comes once; the grid
        of single calls, which tells nothing of an op's speed, only where the word is its name.

    Raises
    ------
    ValueError
        If an op or a dtype does not exist.
    """
    grids = (*dense.CASES, *sparse.CASES) if device == "cuda" else cpu.CASES
    if calls.GRID in shapes.lower().split():
        grids = calls.CASES
    found: dict[tuple[str, str], Case] = {}
    for op in ops:
        if op not in OPS:
            raise ValueError(f"no op is called {op!r}: {nearest_name(op, OPS)}")
        for case in grids:
            if case.op == op and case.backward == backward:
                case = case if dtype is None else case.with_dtype(dtype)
                if case.matches(shapes):
                    found.setdefault((op, case.name), case)
    return list(found.values())
