"""Two recordings side by side: what became faster, slower, right or wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from longctx.bench.records import Recording, Row, Status
from longctx.bench.tables import quantity

__all__ = ["Comparison", "compare_recordings", "comparison_table"]


@dataclass(frozen=True)
class Comparison:
    """One row of either recording.

    Attributes
    ----------
    first, second : Row or None
        None where only the other recording has the row.
    """

    first: Row | None
    second: Row | None

    @property
    def row(self) -> Row:
        """The row that exists, the second's where both do."""
        row = self.second or self.first
        assert row is not None
        return row

    @property
    def ratio(self) -> float | None:
        """First time / second time: above 1 the second is faster. None without two times."""
        times = [row.ms if row else None for row in (self.first, self.second)]
        if times[0] is None or times[1] is None:
            return None
        return times[0] / times[1]

    def note(self, names: Sequence[str]) -> str:
        """Return what a ratio does not tell, in words."""
        if self.first is None or self.second is None:
            return f"only in {names[1] if self.first is None else names[0]}"
        if self.first.status != self.second.status:
            return f"{self.first.status} -> {self.second.status}"
        if self.second.status != Status.OK:
            return self.second.status
        overlap = _overlap(self.first, self.second)
        return "within the spread" if overlap else ""


def _overlap(first: Row, second: Row) -> bool:
    bounds = [(row.ms_low, row.ms_high) for row in (first, second)]
    if any(value is None for pair in bounds for value in pair):
        return False
    (low_a, high_a), (low_b, high_b) = bounds
    assert low_a is not None
    assert high_a is not None
    assert low_b is not None
    assert high_b is not None
    return low_a <= high_b and low_b <= high_a


def compare_recordings(first: Recording, second: Recording) -> list[Comparison]:
    """Return the rows of both recordings, paired by op, case and contestant, in their order."""
    others = {row.key: row for row in second.rows}
    pairs = [Comparison(row, others.pop(row.key, None)) for row in first.rows]
    return pairs + [Comparison(None, row) for row in others.values()]


def comparison_table(pairs: Sequence[Comparison], names: Sequence[str]) -> Table:
    """Return the table of ratios, with their geometric mean.

    Parameters
    ----------
    pairs : sequence of Comparison
    names : sequence of str
        Names of the two recordings.
    """
    ratios = [pair.ratio for pair in pairs if pair.ratio is not None]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("op", "shape", "contestant"):
        table.add_column(title, overflow="fold")
    for title in (f"{names[0]} ms", f"{names[1]} ms", "times faster"):
        table.add_column(title, justify="right")
    table.add_column("note")
    for pair in pairs:
        row = pair.row
        times = [quantity(r.ms if r else None) for r in (pair.first, pair.second)]
        ratio = "" if pair.ratio is None else f"{pair.ratio:.3f}"
        cells = (row.op, row.case, row.contestant)
        table.add_row(*map(escape, cells), *times, ratio, escape(pair.note(names)))
    if mean is not None:
        table.add_row("", f"geometric mean of {len(ratios)}", "", "", "", f"{mean:.3f}", "")
    return table
