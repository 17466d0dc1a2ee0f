"""Directives whose content comes from the code: support matrices, features, benchmark scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from declared import COLUMNS, matrix, scripts
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from longctx.protocols.families import FEATURES, OPS


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> nodes.table:
    """Return a table; a short row leaves its last cells empty."""
    group = nodes.tgroup(cols=len(header))
    for column, title in enumerate(header):
        cells = [row[column] for row in rows if column < len(row)]
        group.append(nodes.colspec(colwidth=max(map(len, (title, *cells)))))
    head, body = nodes.thead(), nodes.tbody()
    group.extend((head, body))
    for section, cells in ((head, header), *((body, row) for row in rows)):
        row = nodes.row()
        for text in (*cells, *[""] * (len(header) - len(cells))):
            row.append(nodes.entry("", nodes.paragraph(text=text)))
        section.append(row)
    return nodes.table("", group, classes=["colwidths-auto"])


class SupportMatrix(SphinxDirective):
    """``{support-matrix} op ...``: what the installed backends declare for the ops."""

    required_arguments = 1
    optional_arguments = 20

    def run(self) -> list[nodes.Node]:
        """Return one table an op, under the op's name."""
        self.env.note_reread()  # the tables may have changed although the page has not
        found: list[nodes.Node] = []
        for op in self.arguments:
            if op not in OPS:
                raise self.error(f"no op is called {op!r}")
            found += [nodes.paragraph("", "", nodes.literal(text=op)), table(COLUMNS, matrix(op))]
        return found


class FeatureTable(SphinxDirective):
    """``{feature-table}``: the optional features that a request may carry."""

    def run(self) -> list[nodes.Node]:
        """Return the table of `longctx.protocols.families.FEATURES`."""
        self.env.note_reread()
        return [table(("feature", "the call uses"), [*FEATURES.items()])]


class BenchmarkScripts(SphinxDirective):
    """``{benchmark-scripts}``: the scripts that exist, with the first sentence of each."""

    def run(self) -> list[nodes.Node]:
        """Return the table, from the docstrings."""
        self.env.note_reread()
        return [table(("script", "what it does"), scripts())]


def setup(app: Any) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("support-matrix", SupportMatrix)
    app.add_directive("feature-table", FeatureTable)
    app.add_directive("benchmark-scripts", BenchmarkScripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
