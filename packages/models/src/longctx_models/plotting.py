"""Pictures of results; matplotlib comes with the extra ``plot``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["heat_map", "length_label"]


def length_label(tokens: int) -> str:
    """Return a length as people say it: 8192 is 8K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens / 1024:.1f}K"


def heat_map(
    path: Path,
    scores: Mapping[str, Mapping[tuple[float, int], float]],
    *,
    depths: Sequence[float],
    lengths: Sequence[int],
    title: str,
) -> None:
    """Draw one depth x length panel a method and write a PNG, whole or not at all.

    Parameters
    ----------
    path : Path
        Where to write; missing folders are made.
    scores : mapping of method to mapping of (depth, length) to float
        Share of right answers, 0 to 1; a missing cell stays blank.
    depths, lengths : sequence
        Rows (0 is the beginning of the text) and columns.
    title : str

    Raises
    ------
    ImportError
        If matplotlib is missing; says how to get it.
    OSError
        If the file cannot be written; nothing is left behind.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib: pip install 'longctx-models[plot]'"
        ) from error

    height = 1.1 + 0.32 * len(depths)
    figure = Figure(figsize=(1.2 + 2.1 * len(scores), height), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    image = None
    for axis, (method, cells) in zip(panels, scores.items(), strict=True):
        grid = [
            [cells.get((depth, length), float("nan")) for length in lengths] for depth in depths
        ]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(method, fontsize=9)
        axis.set_xticks(range(len(lengths)), [length_label(n) for n in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if value == value:  # not a missing cell
                    axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7)
    panels[0].set_ylabel("depth of the fact", fontsize=8)
    figure.supxlabel("length of the text, tokens", fontsize=8)
    figure.suptitle(title, fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="right answers", shrink=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the picture appears whole: a full disk leaves the old file, or none
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
