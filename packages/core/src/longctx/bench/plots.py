"""Pictures of a recording: latency against length, the roofline, ratios to peers."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longctx.bench.case import length_label
from longctx.bench.records import Recording, Row, Status

__all__ = ["draw", "require_matplotlib"]

_COLOURS = "tab10"


def require_matplotlib() -> None:
    """Raise one sentence with the remedy if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error


def draw(recording: Recording, folder: Path) -> list[Path]:
    """Draw what a recording has figures for, as PNG files.

    Parameters
    ----------
    recording : Recording
    folder : Path
        Made if missing.

    Returns
    -------
    list of Path
        Empty if no row has a figure.

    Raises
    ------
    ImportError
        If matplotlib is missing; says how to get it.
    """
    require_matplotlib()
    rows = [row for row in recording.rows if row.status == Status.OK and row.ms]
    if not rows:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == op]
        written += [_latency(own, op, recording.header, folder)]
        written += [_ratios(own, op, recording.header, folder)]
    written.append(_roofline(rows, recording.header, folder))
    return [path for path in written if path is not None]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    from matplotlib import colormaps

    names = dict.fromkeys(row.contestant for row in rows)
    return {name: colormaps[_COLOURS](i % 10) for i, name in enumerate(names)}


def _save(figure: Any, path: Path, header: Mapping[str, Any]) -> Path:
    where = f"{header.get('device', '')} · torch {header.get('torch', '')}"
    commit = header.get("commit")
    figure.supxlabel(where + (f" · {commit[:9]}" if commit else ""), fontsize=7)
    scratch = path.with_suffix(".part.png")
    figure.savefig(scratch, dpi=150)
    os.replace(scratch, path)
    return path


def _length(row: Row) -> int | None:
    axes = row.shape.get("axes", {})
    names = ("seq", "k_len", "prefix_len", "shard_len")
    found: int | None = next((axes[name] for name in names if name in axes), None)
    return found


def _series(row: Row) -> tuple[str, str]:
    """Return the contestant, and the case without its length and batch."""
    hidden = ("T", "K", "L", "B")
    words = [w for w in row.case.split() if not (w[0] in hidden and w[1:2].isdigit())]
    return row.contestant, " ".join([row.grid, *words])


def _latency(rows: Sequence[Row], op: str, header: Mapping[str, Any], folder: Path) -> Path | None:
    """Draw one line a contestant and kind of shape that has several lengths."""
    lines: dict[tuple[str, str], list[tuple[int, Row]]] = defaultdict(list)
    for row in rows:
        length = _length(row)
        if length is not None:
            lines[_series(row)].append((length, row))
    lines = {key: line for key, line in lines.items() if len({x for x, _ in line}) > 1}
    if not lines:
        return None
    kinds = list(dict.fromkeys(kind for _, kind in lines))
    columns = min(3, len(kinds))
    height = -(-len(kinds) // columns)
    figure = _figure(4.2 * columns, 3.2 * height + 0.4)
    panels = figure.subplots(height, columns, squeeze=False).flatten()
    colours = _colours(rows)
    for panel, kind in zip(panels, kinds, strict=False):
        for (name, own), line in lines.items():
            if own != kind:
                continue
            line.sort(key=lambda point: point[0])
            x, y = [p[0] for p in line], [p[1].ms or 0.0 for p in line]
            low = [m - (p[1].ms_low or m) for p, m in zip(line, y, strict=True)]
            high = [(p[1].ms_high or m) - m for p, m in zip(line, y, strict=True)]
            panel.errorbar(
                x, y, yerr=(low, high), marker="o", ms=3, lw=1, color=colours[name], label=name
            )
        panel.set_xscale("log", base=2)
        lengths = sorted({x for (_, own), line in lines.items() if own == kind for x, _ in line})
        panel.set_xticks(lengths, [length_label(n) for n in lengths], fontsize=7)
        panel.set_yscale("log")
        panel.set_title(kind, fontsize=7)
        panel.set_xlabel("tokens", fontsize=7)
        panel.set_ylabel("ms", fontsize=7)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    figure.suptitle(f"{op}: latency against length", fontsize=10)
    return _save(figure, folder / f"latency_{op}.png", header)


def _ratios(rows: Sequence[Row], op: str, header: Mapping[str, Any], folder: Path) -> Path | None:
    """Draw, for every backend and case, how many times faster it is than each peer."""
    peers = {row.contestant for row in rows if row.kind == "peer"}
    bars = [
        (f"{row.contestant}: {row.case}", peer, row.ratios[peer])
        for row in rows
        if row.kind == "backend"
        for peer in row.ratios
        if peer in peers
    ]
    if not bars:
        return None
    labels = list(dict.fromkeys(label for label, _, _ in bars))
    names = list(dict.fromkeys(peer for _, peer, _ in bars))
    colours = _colours(rows)
    thickness = 0.8 / len(names)
    figure = _figure(8, 1 + 0.16 * len(bars) + 0.1 * len(labels))
    panel = figure.subplots()
    for i, name in enumerate(names):
        own = [(labels.index(label), ratio) for label, peer, ratio in bars if peer == name]
        places = [place + i * thickness for place, _ in own]
        panel.barh(places, [r for _, r in own], height=thickness, color=colours[name], label=name)
    panel.axvline(1, color="black", lw=0.8)
    panel.set_yticks([i + 0.4 - thickness / 2 for i in range(len(labels))], labels, fontsize=6)
    panel.margins(y=0.01)
    panel.invert_yaxis()
    panel.set_xlabel("times faster than the peer", fontsize=8)
    panel.legend(fontsize=7)
    figure.suptitle(op, fontsize=10)
    return _save(figure, folder / f"ratios_{op}.png", header)


def _roofline(rows: Sequence[Row], header: Mapping[str, Any], folder: Path) -> Path | None:
    """Draw achieved FLOP/s over arithmetic intensity, under the ceilings of the run."""
    points = [row for row in rows if row.tflops and row.gbytes]
    rates: Mapping[str, float] = header.get("ceilings", {})
    bandwidth = max(rates.get("copy_tbs", 0.0), rates.get("read_tbs", 0.0))
    if not points or not bandwidth:
        return None
    intensity = {id(row): row.gflop / row.gbytes for row in points}
    figure = _figure(7, 5)
    panel = figure.subplots()
    low, high = min(intensity.values()) / 2, max(intensity.values()) * 2
    for name, rate in rates.items():
        if name.startswith("matmul_"):
            knee = rate / bandwidth
            xs = [low, knee, max(high, 2 * knee)]
            panel.plot(xs, [min(rate, x * bandwidth) for x in xs], color="black", lw=0.8)
            kind = name.removeprefix("matmul_").removesuffix("_tflops")
            panel.annotate(
                f"{kind} {rate:.3g}", (xs[-1], rate), fontsize=7, ha="right", va="bottom"
            )
    colours = _colours(rows)
    for contestant, colour in colours.items():
        own = [row for row in points if row.contestant == contestant]
        if own:
            panel.scatter(
                [intensity[id(row)] for row in own],
                [row.tflops for row in own],
                s=10,
                color=colour,
                label=contestant,
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("FLOP a byte", fontsize=8)
    panel.set_ylabel("TFLOP/s", fontsize=8)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    figure.suptitle("achieved rates under the ceilings of the same run", fontsize=10)
    return _save(figure, folder / "roofline.png", header)
