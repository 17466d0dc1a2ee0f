"""Insert statements into a text at the ends of sentences, lines or words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Snap = Callable[[bytes, int], int]

_SENTENCE_END = re.compile(rb"[.!?:][ \n]+|\n+")
_WORD_END = re.compile(rb"[ \n]")
_SENTENCE_WINDOW = 300
_WORD_WINDOW = 60


def sentence_boundary(text: bytes, target: int) -> int:
    """Return the end of a sentence or line nearest to an offset, else the end of a word.

    Both ends of the text count as boundaries. Where a text has no boundary near the offset (no
    spaces, say), the offset itself is returned, moved out of a UTF-8 character.
    """
    found = _nearest(_SENTENCE_END, text, target, _SENTENCE_WINDOW)
    return word_boundary(text, target) if found is None else found


def word_boundary(text: bytes, target: int) -> int:
    """Return the end of a word nearest to an offset, see `sentence_boundary`."""
    found = _nearest(_WORD_END, text, target, _WORD_WINDOW)
    if found is not None:
        return found
    while 0 < target < len(text) and text[target] & 0xC0 == 0x80:
        target -= 1
    return target


def _nearest(pattern: re.Pattern[bytes], text: bytes, target: int, window: int) -> int | None:
    low, high = max(0, target - window), min(len(text), target + window)
    ends = [match.end() for match in pattern.finditer(text, low, high)]
    if low == 0:
        ends.append(0)
    if high == len(text):
        ends.append(high)
    return min(ends, key=lambda end: abs(end - target), default=None)


def insert_at_boundaries(
    text: bytes,
    statements: Sequence[tuple[float, bytes]],
    snap: Snap = sentence_boundary,
) -> list[tuple[bytes, bool]]:
    """Insert statements into a text.

    Parameters
    ----------
    text
        The haystack.
    statements
        Pairs of a depth between 0 and 1 and a statement; each grows by one separating byte.
        Statements that meet at one boundary keep the order of their depths.
    snap
        Chooses the place next to an offset.

    Returns
    -------
    list of (bytes, bool)
        The spans of the result in order; the flag says whether a span is a statement.
    """
    spans: list[tuple[bytes, bool]] = []
    start = 0
    for depth, statement in sorted(statements, key=lambda item: item[0]):
        # Two targets in one window may snap in either order; never go back.
        place = max(start, snap(text, round(depth * len(text))))
        before = text[place - 1 : place]
        if before in (b"", b"\n"):
            separated = statement + b"\n"
        elif before.isspace():
            separated = statement + b" "
        else:
            separated = b" " + statement
        spans += [(text[start:place], False), (separated, True)]
        start = place
    spans.append((text[start:], False))
    return spans
