"""The training mixture: scenes in many formats, with as many questions as their budget allows."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fact_mixture import fact_scene

from longctx_models.evaluation.needle.placement import sentence_boundary, word_boundary
from longctx_models.evaluation.needle.scenes import Entry, Layout, Scene, assemble
from longctx_models.evaluation.needle.tasks import (
    NEEDLE_PREAMBLE,
    NEEDLE_QUESTIONS,
    NEEDLE_STATEMENTS,
    chain_entry,
    json_entry,
    needle_entry,
    ruler_chain_entry,
)
from longctx_models.evaluation.needle.text import RULER_NOISE, TextSource, cut_from
from longctx_models.evaluation.needle.values import (
    digits,
    distinct,
    hexadecimal,
    letters,
    needle_key,
    pseudoword,
    uuid,
)

SceneMaker = Callable[[random.Random, TextSource, int], Scene]

_ONE_QUESTION_SHARE = 0.15
_MOST_QUESTIONS = 64
_FAR_FROM, _FAR_SHARE, _FAR_DEPTH = 8192, 0.25, 0.03
_ALPHANUMERIC = string.ascii_letters + string.digits


def needle_scene(rng: random.Random, source: TextSource, length: int) -> Scene:
    """Hide 1 to 96 needles in prose, few more often than many."""
    most = max(1, min(96, int(length * 0.4 / 64)))
    count = max(1, min(most, int(math.exp(rng.uniform(0, math.log(most + 1))))))
    head = b""
    attribute, entries = _needles(rng, source, count)
    if rng.random() < 0.3 and length >= 1024:
        head = NEEDLE_PREAMBLE.format(a=attribute).encode()
    return Scene("needle", entries, head)


def needle_haystack_scene(rng: random.Random, source: TextSource, length: int) -> Scene:
    """Fill the context with needles."""
    _, entries = _needles(rng, source, max(4, length // 44))
    return Scene("needle_haystack", entries, separator=rng.choice((b"\n", b" ", b" ")))


def key_value_scene(rng: random.Random, source: TextSource, length: int) -> Scene:
    """List keys and values of many kinds in lines."""
    short = length <= 1024
    key_size = rng.randint(2, 8) if short else rng.randint(4, 12)
    value_size = rng.randint(3, 8) if short else rng.randint(3, 12)
    make_key: Callable[[], str] = rng.choice(
        (
            partial(hexadecimal, rng, key_size),
            partial(letters, rng, key_size),
            partial(needle_key, rng, source.words),
            partial(letters, rng, key_size, _ALPHANUMERIC),
        )
    )
    make_value: Callable[[], str] = rng.choice(
        (
            partial(hexadecimal, rng, value_size),
            partial(letters, rng, value_size),
            partial(digits, rng, value_size),
            partial(rng.choice, source.words),
        )
    )
    (between,) = rng.choices((": ", "=", " -> "), (0.6, 0.2, 0.2))
    full_question = rng.random() < 0.5
    lead = "" if between == "=" and not full_question else " "
    entries = []
    for key in distinct(make_key, max(3, length // (key_size + value_size + 3))):
        value = make_value()
        question = (
            f"\nQuestion: What is the value for {key}?\nAnswer:"
            if full_question
            else f"\n{key}{between.rstrip()}"
        )
        statement = f"{key}{between}{value}".encode()
        entries.append(Entry((statement,), question.encode(), f"{lead}{value}\n".encode()))
    head = rng.choice((b"", b"", b"Key-value pairs:\n", b"Data:\n", b"Here is a list.\n"))
    return Scene("key_value", tuple(entries), head, b"\n", b"\n")


def json_scene(rng: random.Random, source: TextSource, length: int) -> Scene:
    """Write a JSON object of UUIDs or of shorter hexadecimal strings."""
    if rng.random() < (0.6 if length >= 2048 else 0.3 if length >= 1024 else 0.0):
        size, make = 36, partial(uuid, rng)
    else:
        size = rng.randint(6, 12) if length < 2048 else rng.randint(8, 20)
        make = partial(hexadecimal, rng, size)
    keys = distinct(make, max(2, length // (2 * size + 8)))
    entries = tuple(json_entry(key, make()) for key in keys)
    return Scene("json", entries, b"JSON data:\n{", b"}\n", b", ")


def chain_scene(rng: random.Random, source: TextSource, length: int) -> Scene:
    """Hide forward chains in prose and ask for the last name of a chain or an earlier one."""
    chains, hops, names = _chains(rng, length)
    entries = []
    for i in range(chains):
        chain = names[i * (hops + 1) : (i + 1) * (hops + 1)]
        value = digits(rng, 5)
        upto = hops + 1 if rng.random() < 0.6 else rng.randint(1, hops + 1)
        whole, asked = chain_entry(chain, value), chain_entry(chain[:upto], value)
        entries.append(Entry(whole.statements, asked.question, asked.answer))
    return Scene("chain", tuple(entries))


def ruler_chain_scene(rng: random.Random, source: TextSource, length: int) -> Scene:
    """Hide chains in prose and ask for all names that hold a value."""
    chains, hops, names = _chains(rng, length)
    return Scene(
        "ruler_chain",
        tuple(
            ruler_chain_entry(names[i * (hops + 1) : (i + 1) * (hops + 1)], digits(rng, 5))
            for i in range(min(chains, 5))
        ),
    )


def copy_scene(rng: random.Random, source: TextSource, length: int) -> Scene:
    """List random lines, all of which are asked for: the densest lesson in induction."""
    size = rng.randint(8, 40)
    alphabet = rng.choice(
        ("0123456789abcdef", string.ascii_lowercase, string.digits, string.ascii_uppercase)
    )
    lines = distinct(
        partial(letters, rng, size, alphabet), max(2, (length - 16) // (2 * size + 4))
    )
    return Scene(
        "copy",
        tuple(
            Entry((line.encode(),), b"\n" + line[:5].encode(), line[5:].encode() + b"\n")
            for line in lines
        ),
        tail=b"\n",
        separator=b"\n",
    )


@dataclass(frozen=True)
class Ingredient:
    """A part of the training mixture.

    Attributes
    ----------
    name
        Name of the task.
    make
        Makes a scene of about a length.
    shares
        Share of the sequences of up to 512 tokens, of up to 2048 and of longer ones.
    weight
        Weight of its answer bytes in the loss of a batch, the larger the fewer it has.
    """

    name: str
    make: SceneMaker
    shares: tuple[float, float, float]
    weight: float = 1.0


INGREDIENTS = (
    Ingredient("copy", copy_scene, (0.17, 0.02, 0.01), 0.5),
    Ingredient("key_value", key_value_scene, (0.31, 0.11, 0.10)),
    Ingredient("needle", needle_scene, (0.19, 0.12, 0.12), 1.5),
    Ingredient("needle_haystack", needle_haystack_scene, (0.05, 0.06, 0.08), 1.5),
    Ingredient("json", json_scene, (0.05, 0.07, 0.09)),
    Ingredient("ruler_chain", ruler_chain_scene, (0.01, 0.01, 0.01)),
    Ingredient("chain", chain_scene, (0.05, 0.09, 0.09)),
    Ingredient("fact", fact_scene, (0.17, 0.52, 0.50), 3.0),
)
GATES = ("key_value", "needle")
"""Tasks whose first bytes decide when the curriculum goes on."""


class Mixture:
    """Draws training sequences.

    Parameters
    ----------
    source
        Prose and words.
    """

    def __init__(self, source: TextSource) -> None:
        self.source = source
        noise = TextSource((cut_from(RULER_NOISE.encode() * 1000),), (1.0,), source.words)
        self._prose = (source, source, source, source, noise)

    def draw(self, rng: random.Random, length: int) -> tuple[int, Layout]:
        """Return the index of a task and a sequence of `length` bytes."""
        column = 0 if length <= 512 else 1 if length <= 2048 else 2
        (index,) = rng.choices(range(len(INGREDIENTS)), [i.shares[column] for i in INGREDIENTS])
        scene = INGREDIENTS[index].make(rng, self.source, length)
        asked = _choose_asked(rng, scene, length)
        # Users' texts have needles anywhere: at the ends of sentences or words, or inside one.
        snap = rng.choices((sentence_boundary, word_boundary, _anywhere), (0.55, 0.35, 0.10))[0]
        prose = rng.choice(self._prose) if scene.task.endswith("chain") else self.source
        # The very beginning of a long text is the hardest place, and rare at random.
        depths = {}
        if length >= _FAR_FROM and rng.random() < _FAR_SHARE:
            depths = {i: rng.uniform(0, _FAR_DEPTH) for i in asked[: 1 + len(asked) // 4]}
        return index, assemble(rng, scene, asked, length, prose, depths, snap)


def _anywhere(text: bytes, target: int) -> int:
    return target


def _choose_asked(rng: random.Random, scene: Scene, length: int) -> list[int]:
    """Choose entries in random order while their questions fit a share of the length."""
    order = list(range(len(scene.entries)))
    rng.shuffle(order)
    if rng.random() < _ONE_QUESTION_SHARE and scene.task != "copy":
        return order[:1]
    room = length - len(scene.head) - len(scene.tail) - 64
    share = 0.4 if length <= 1024 else 0.25 if length <= 4096 else 0.12
    budget = length if scene.task == "copy" else share * length
    separator = len(scene.separator or b" ")
    asked: list[int] = []
    used = total = 0
    for i in order[:_MOST_QUESTIONS]:
        entry = scene.entries[i]
        cost = len(entry.question) + len(entry.answer)
        total += cost + entry.size(separator)
        used += cost
        if asked and (used > budget or total > room):
            break
        asked.append(i)
    return asked


def _needles(rng: random.Random, source: TextSource, count: int) -> tuple[str, tuple[Entry, ...]]:
    """Return an attribute and needles about it; questions share a wording most of the time."""
    (attribute,) = rng.choices(
        ("special magic number", "secret code", "access code", "pass key", "lucky number"),
        (0.6, 0.1, 0.1, 0.1, 0.1),
    )
    kind = rng.choices(range(5), (0.5, 0.2, 0.1, 0.08, 0.12))[0]
    make_value: Callable[[], str] = (
        partial(digits, rng, 7),
        lambda: digits(rng, rng.randint(4, 10)),
        lambda: f"{rng.choice(source.words)}-{rng.choice(source.words)}",
        partial(uuid, rng),
        partial(hexadecimal, rng, 8),
    )[kind]
    if attribute == "special magic number" and kind in (2, 3):
        attribute = "special magic word" if kind == 2 else "special magic uuid"
    (statement,) = rng.choices(NEEDLE_STATEMENTS, (0.45, 0.35, 0.2))
    same = rng.random() < 0.7
    question = rng.choice(NEEDLE_QUESTIONS)
    entries = tuple(
        needle_entry(
            statement,
            question if same else rng.choice(NEEDLE_QUESTIONS),
            attribute,
            key,
            make_value(),
        )
        for key in distinct(partial(needle_key, rng, source.words), count)
    )
    return attribute, entries


def _chains(rng: random.Random, length: int) -> tuple[int, int, list[str]]:
    """Draw how many chains there are, their hops, and names for all of them."""
    short = length <= 1024
    chains = rng.randint(2, 8 if short else 16)
    hops = rng.randint(0, 2) if short else rng.choice((0, 1, 2, 2, 2, 3, 4))
    make = (
        partial(letters, rng, 5, string.ascii_uppercase)
        if rng.random() < 0.75
        else partial(pseudoword, rng)
    )
    names = distinct(make, chains * (hops + 1))
    return len(names) // (hops + 1), hops, names
