"""Scenes: statements that can be asked about, and the haystack that they lie in.

A task makes a scene. `assemble` lays it out at an exact length and with the asked statements at
wanted depths: one question for evaluation, as many as fit for training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .placement import Snap, insert_at_boundaries, sentence_boundary
from .text import TextSource


@dataclass(frozen=True)
class Entry:
    """Statements in their order, and a question that they answer.

    Attributes
    ----------
    statements
        One sentence or line; several for a chain.
    question
        What follows the context.
    answer
        What the model has to write, with the leading space and the final line end.
    """

    statements: tuple[bytes, ...]
    question: bytes
    answer: bytes

    def size(self, separator: int = 1) -> int:
        """Return the bytes that the statements take, each with its separator."""
        return sum(len(statement) + separator for statement in self.statements)


@dataclass(frozen=True)
class Scene:
    """Entries and how they are laid out.

    Attributes
    ----------
    task
        Name of the task.
    entries
        What can be asked about.
    head, tail
        What comes before and after everything else in the context.
    separator
        Joins the entries of a haystack that consists of nothing else; None puts them into prose.
    """

    task: str
    entries: tuple[Entry, ...]
    head: bytes = b""
    tail: bytes = b""
    separator: bytes | None = None


@dataclass(frozen=True)
class Layout:
    """A scene at its final length.

    Attributes
    ----------
    spans
        The context in order; the flag says whether a span is prose (and no statement).
    questions
        Pairs of question and answer.
    offset
        Where the first asked entry's first statement begins in the context.
    """

    task: str
    spans: tuple[tuple[bytes, bool], ...]
    questions: tuple[tuple[bytes, bytes], ...]
    offset: int

    @property
    def context(self) -> bytes:
        """Return the context as one string."""
        return b"".join(span for span, _ in self.spans)


def assemble(
    rng: random.Random,
    scene: Scene,
    asked: Sequence[int],
    length: int,
    source: TextSource,
    depths: Mapping[int, float] | None = None,
    snap: Snap = sentence_boundary,
) -> Layout:
    """Lay a scene out so that context, questions and answers have `length` bytes together.

    Entries that are not asked about are dropped at random where there is no room for them.

    Parameters
    ----------
    rng
        Source of every random choice.
    scene
        What to lay out.
    asked
        Indices of the entries that are asked about, in order.
    length
        Total bytes of the result.
    source
        Prose between the statements.
    depths
        Depths of some entries, by index; the others lie anywhere. A chain's first statement
        gets the depth and the later ones follow anywhere behind it.
    snap
        Chooses the place of a statement in prose.

    Raises
    ------
    ValueError
        If the asked entries and their questions alone are longer than `length`.
    """
    depths = depths or {}
    questions = tuple((scene.entries[i].question, scene.entries[i].answer) for i in asked)
    room = length - len(scene.head) - len(scene.tail) - sum(len(q) + len(a) for q, a in questions)
    kept, left = _fit(rng, scene, asked, room)
    if scene.separator is None:
        body = _in_prose(rng, scene, kept, source.prose(rng, left), depths, snap)
    else:
        body = _back_to_back(rng, scene, kept, left, depths)
    spans = ((scene.head, False), *body, (scene.tail, False))
    offset = _find(spans, scene.entries[asked[0]].statements[0])
    return Layout(scene.task, spans, questions, offset)


def _fit(
    rng: random.Random, scene: Scene, asked: Sequence[int], room: int
) -> tuple[list[int], int]:
    """Keep the asked entries and as many others as fit; return them and the bytes left."""
    separator = 1 if scene.separator is None else len(scene.separator)
    left = room - sum(scene.entries[i].size(separator) for i in asked)
    if left < 0:
        raise ValueError(f"{scene.task} needs {-left} bytes more than the length allows")
    kept = list(asked)
    others = sorted(set(range(len(scene.entries))).difference(asked))
    rng.shuffle(others)
    for i in others:
        size = scene.entries[i].size(separator)
        if size <= left:
            kept.append(i)
            left -= size
    return kept, left


def _in_prose(
    rng: random.Random,
    scene: Scene,
    kept: Sequence[int],
    prose: bytes,
    depths: Mapping[int, float],
    snap: Snap,
) -> list[tuple[bytes, bool]]:
    placed: list[tuple[float, bytes]] = []
    for i in kept:
        statements = scene.entries[i].statements
        first = depths.get(i)
        if first is None:
            places = sorted(rng.random() for _ in statements)
        else:
            places = [first, *sorted(rng.uniform(first, 1.0) for _ in statements[1:])]
        placed += zip(places, statements, strict=True)
    spans = insert_at_boundaries(prose, placed, snap)
    return [(span, not is_statement) for span, is_statement in spans]


def _back_to_back(
    rng: random.Random,
    scene: Scene,
    kept: Sequence[int],
    left: int,
    depths: Mapping[int, float],
) -> list[tuple[bytes, bool]]:
    """Join entries; line ends in front of them fill what is left."""
    assert scene.separator is not None
    order = [i for i in kept if i not in depths]
    rng.shuffle(order)
    for i, depth in depths.items():
        order.insert(round(depth * len(order)), i)
    joined = scene.separator.join(s for i in order for s in scene.entries[i].statements)
    return [(b"\n" * (left + len(scene.separator)), False), (joined, False)]


def _find(spans: Sequence[tuple[bytes, bool]], statement: bytes) -> int:
    start = 0
    for span, _ in spans:
        inside = span.find(statement)
        if inside >= 0:
            return start + inside
        start += len(span)
    raise AssertionError("an asked statement is missing from its context")
