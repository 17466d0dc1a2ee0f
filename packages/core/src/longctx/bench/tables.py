"""Rows as tables on a terminal, printed case by case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longctx.bench.case import Case
from longctx.bench.counting import work_of
from longctx.bench.records import Row, Status

__all__ = [
    "case_heading",
    "case_table",
    "ceilings_line",
    "list_table",
    "plain_console",
    "quantity",
]

_FIGURES = (("ms", 6), ("20-80 %", 11), ("TFLOP/s", 7), ("TB/s", 8), ("of ceiling", 11))
"""Columns of figures with their least widths, so that the cases stand below one another."""

_STYLES = {Status.WRONG: "red", Status.FAILED: "red", Status.OUT_OF_MEMORY: "yellow"}


def quantity(value: float | None, digits: int = 3) -> str:
    """Return a number with some significant digits and no exponent; nothing for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    decimals = 0
    while decimals < 6 and abs(value) < 10 ** (digits - 1 - decimals):
        decimals += 1
    return f"{value:.{decimals}f}"


def case_heading(case: Case) -> str:
    """Return the line above a case's table: its name and its work."""
    work = work_of(case)
    cost = f"{quantity(work.flops / 1e9)} GFLOP, {quantity(work.bytes / 1e9)} GB"
    return f"[bold]{escape(case.op)}[/] {escape(case.name)} [dim]({case.grid}; {cost})[/]"


def case_table(rows: Sequence[Row]) -> Table:
    """Return the contestants of one case: times, rates, share of the ceiling, ratios to peers.

    On a GPU with what a call costs the host. A row without figures has its reason in the columns
    of the figures.
    """
    peers = [row.contestant for row in rows if row.kind == "peer" and row.status == Status.OK]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("contestant", min_width=12, no_wrap=True)
    on_host = any(row.host_us is not None for row in rows)
    figures = (*_FIGURES, ("host us", 7)) if on_host else _FIGURES
    for title, width in figures:
        table.add_column(title, justify="right", no_wrap=True, min_width=width)
    table.add_column("faster than", min_width=11, overflow="fold")
    for row in rows:
        if row.status != Status.OK:
            style = _STYLES.get(row.status, "dim")
            reason = escape(f"{row.status}: {row.note}")
            table.add_row(row.contestant, *[""] * len(figures), f"[{style}]{reason}[/]")
            continue
        ratios = (f"{peer} {row.ratios[peer]:.2f}" for peer in peers if peer in row.ratios)
        share = "" if row.fraction is None else f"{row.fraction:.0%} {row.bound}"
        table.add_row(
            row.contestant,
            quantity(row.ms),
            f"{quantity(row.ms_low)}-{quantity(row.ms_high)}",
            quantity(row.tflops),
            quantity(row.tbs),
            share,
            *([quantity(row.host_us)] if on_host else []),
            ", ".join(ratios) if row.kind == "backend" else "",
        )
    return table


def ceilings_line(rates: Mapping[str, Any]) -> str:
    """Return the ceilings in one line."""
    parts = [
        f"{name.removeprefix('matmul_').removesuffix('_tflops')} matmul {quantity(rate)} TFLOP/s"
        for name, rate in rates.items()
        if name.startswith("matmul_")
    ]
    parts += [f"{what} {quantity(rates[f'{what}_tbs'])} TB/s" for what in ("copy", "read")]
    return ", ".join(parts)


def list_table(cases: Iterable[Case]) -> Table:
    """Return the shapes that would be run."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("op", "grid", "shape"):
        table.add_column(title, overflow="fold")
    for title in ("GFLOP", "GB"):
        table.add_column(title, justify="right")
    for case in cases:
        work = work_of(case)
        cost = quantity(work.flops / 1e9), quantity(work.bytes / 1e9)
        table.add_row(case.op, case.grid, case.name, *cost)
    return table


def plain_console(console: Console) -> Console:
    """Return a console wide enough for the tables where the output is no terminal."""
    if console.is_terminal:
        return console
    return Console(file=console.file, width=max(console.width, 160))
