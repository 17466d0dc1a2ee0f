"""One standard shape of one op: what is measured, by name."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import Any

from longctx.support import DTYPES

__all__ = ["Axes", "Case", "axes", "length_label"]

Axes = tuple[tuple[str, int], ...]
"""Sizes by axis name, in the order of a case's name."""

_SYMBOLS = {
    "batch": "B",
    "parts": "P",
    "q_len": "Q",
    "seq": "T",
    "k_len": "K",
    "sequences": "seqs",
    "rows": "R",
    "q_heads": "H",
    "heads": "H",
    "index_heads": "I",
    "head_dim": "D",
    "index_dim": "D",
    "channels": "D",
    "value_dim": "V",
    "top_k": "top",
    "page_size": "page",
    "window_queries": "W",
    "prefix_len": "L",
    "shards": "S",
    "shard_len": "L",
    "block": "block",
    "columns": "columns",
    "diagonals": "diagonals",
    "sink_tokens": "sinks",
    "block_size": "block",
    "anchor_size": "anchor",
    "recent": "recent",
}
"""How an axis is written in a case's name; axes that are not here do not show."""

_LENGTHS = {"q_len", "seq", "k_len", "prefix_len", "shard_len", "block_size", "anchor_size"}


def axes(**sizes: int) -> Axes:
    """Return sizes by axis name in the form that a `Case` holds."""
    return tuple(sizes.items())


def length_label(tokens: int) -> str:
    """Return a length as people write it: 16384 is 16K, 1048576 is 1M, 300 stays 300."""
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


@dataclass(frozen=True, slots=True)
class Case:
    """A call of one op at one shape.

    Attributes
    ----------
    op : str
        Public op name.
    grid : str
        The set of shapes that it belongs to, such as ``"fa3"``.
    axes : tuple of (str, int)
        Sizes by axis name; read one with ``case["head_dim"]``.
    dtype : str
        Short name of the inputs' data type.
    kv_dtype : str
        Of a KV cache; empty where it is ``dtype``.
    causal : bool
        Bottom-right causal; False attends all keys.
    window : int, optional
        Earlier keys that a query sees besides itself.
    plan : str
        ``"block"``, ``"stripe"`` or ``"window"`` for block_sparse_attention.
    density : float, optional
        Share that a random plan keeps: key blocks of a block plan, tokens of a token set.
    backward : bool
        Measure the backward pass instead of the forward pass.
    """

    op: str
    grid: str
    axes: Axes
    dtype: str = "bf16"
    kv_dtype: str = ""
    causal: bool = True
    window: int | None = None
    plan: str = ""
    density: float | None = None
    backward: bool = False

    def __getitem__(self, axis: str) -> int:
        """Return the size of an axis."""
        for name, size in self.axes:
            if name == axis:
                return size
        raise KeyError(f"{self.op} has no axis {axis!r}: {', '.join(n for n, _ in self.axes)}")

    def get(self, axis: str, default: int) -> int:
        """Return the size of an axis, ``default`` where the case has none."""
        return dict(self.axes).get(axis, default)

    @property
    def q_len(self) -> int:
        """Number of queries of a sequence."""
        return self.get("q_len", self.get("seq", 1))

    @property
    def k_len(self) -> int:
        """Number of keys of a sequence."""
        return self.get("k_len", self.get("seq", 1))

    @property
    def name(self) -> str:
        """The case in named axes, unique within its op; what ``--shapes`` looks at."""
        axes = dict(self.axes)
        words = []
        for axis, size in self.axes:
            symbol = _SYMBOLS.get(axis)
            if symbol is None or (axis == "page_size" and not size):
                continue
            text = length_label(size) if axis in _LENGTHS else str(size)
            if axis == "q_heads" and axes.get("kv_heads", size) != size:
                text = f"{size}/{axes['kv_heads']}"
            words.append(symbol + text)
        if self.op == "flash_attention" and not self.window:
            words.append("causal" if self.causal else "full")
        if self.plan:
            words.append(f"{self.plan}-plan")
        if self.window is not None:
            words.append(f"window{self.window}")
        if self.density is not None:
            words.append(f"density{self.density:g}")
        words.append(self.dtype)
        if self.kv_dtype and self.kv_dtype != self.dtype:
            words.append(f"kv-{self.kv_dtype}")
        if self.backward:
            words.append("backward")
        return " ".join(words)

    def matches(self, words: str) -> bool:
        """Return whether every word (a glob) is the case's grid or a word of its name."""
        own = [self.grid.lower(), *self.name.lower().split()]
        return all(
            any(fnmatch.fnmatchcase(mine, word) for mine in own) for word in words.lower().split()
        )

    def resized(self, **sizes: int) -> Case:
        """Return the case with other sizes of axes that it has."""
        return replace(self, axes=tuple((n, sizes.get(n, size)) for n, size in self.axes))

    def as_dict(self) -> dict[str, Any]:
        """Return the case as JSON-ready values."""
        return {
            "op": self.op,
            "case": self.name,
            "grid": self.grid,
            "axes": dict(self.axes),
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype or self.dtype,
            "causal": self.causal,
            "window": self.window,
            "plan": self.plan,
            "density": self.density,
            "backward": self.backward,
        }

    def with_dtype(self, dtype: str) -> Case:
        """Return the case in another data type; an fp8 KV cache stays one."""
        if dtype not in DTYPES:
            raise ValueError(f"no dtype is called {dtype!r}: {', '.join(DTYPES)}")
        return replace(self, dtype=dtype)
