"""The retrieval tasks of the needle model: one question about a context of an exact length.

Every generator has the same signature: a seeded random generator, a length in bytes (context,
question and answer together; the tokenizer's beginning-of-sequence byte comes on top), a depth
and a text source. Equal arguments give equal samples.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from .facts import Fact, question_prompt, random_facts
from .scenes import Entry, Scene, assemble
from .templates import HELD_OUT, Templates
from .text import RULER_NOISE, TextSource, cut_from, held_out_source
from .unseen_templates import UNSEEN
from .values import digits, distinct, hexadecimal, letters, needle_key, uuid

NEEDLE_STATEMENTS = (
    "The {a} for {k} is: {v}.",
    "One of the {a}s for {k} is: {v}.",
    "The {a} for {k} is {v}.",
)
NEEDLE_QUESTIONS = (
    "\nQuestion: What is the {a} for {k}?\nAnswer: The {a} for {k} is:",
    "\nWhat is the {a} for {k} mentioned in the provided text? "
    "The {a} for {k} mentioned in the provided text is",
    "\nThe {a} for {k} is:",
    "\nQuestion: What is the {a} for {k}?\nAnswer:",
)
NEEDLE_PREAMBLE = (
    "Some {a}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {a}s afterwards.\n"
)
JSON_QUESTION = '\nKey: "{k}"\nThe value associated with the specified key is:'

_ATTRIBUTE = "special magic number"
# At most this share of a context is needles, so that prose remains to be searched.
_NEEDLE_SHARE = 0.6
_FACTS = 8
_CHAINS = 8

Generator = Callable[[random.Random, int, float, TextSource], "NeedleSample"]


@dataclass(frozen=True)
class NeedleSample:
    """One question about a context.

    Attributes
    ----------
    task
        Name of the task.
    context, question
        The prompt is the one followed by the other.
    answer
        What the model has to write: a space, the value and a line end.
    depth
        Wanted place of the needle, 0 for the beginning of the context to 1 for its end.
    offset
        Where the needle begins in the context.
    """

    task: str
    context: bytes
    question: bytes
    answer: bytes
    depth: float
    offset: int

    @property
    def prompt(self) -> bytes:
        """Return the context followed by the question."""
        return self.context + self.question

    def __len__(self) -> int:
        return len(self.context) + len(self.question) + len(self.answer)


def needle_entry(statement: str, question: str, attribute: str, key: str, value: str) -> Entry:
    """Return a needle in RULER's wording, see `NEEDLE_STATEMENTS` and `NEEDLE_QUESTIONS`."""
    return Entry(
        (statement.format(a=attribute, k=key, v=value).encode(),),
        question.format(a=attribute, k=key).encode(),
        f" {value}\n".encode(),
    )


def fact_entry(fact: Fact) -> Entry:
    """Return a fact in free wording."""
    return Entry(
        (fact.statement.encode(),), question_prompt(fact.question), f" {fact.answer}\n".encode()
    )


def json_entry(key: str, value: str) -> Entry:
    """Return a member of a JSON object."""
    return Entry(
        (f'"{key}": "{value}"'.encode(),),
        JSON_QUESTION.format(k=key).encode(),
        f' "{value}"\n'.encode(),
    )


def chain_statements(names: Sequence[str], value: str) -> tuple[bytes, ...]:
    """Return the assignments of a chain: the first name gets the value, each next one a name."""
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {previous}" for previous, name in pairwise(names)]
    return tuple(line.encode() for line in lines)


def chain_entry(names: Sequence[str], value: str) -> Entry:
    """Return a chain whose last name is asked for; the answer spells the chain backwards."""
    hops = "".join(f" = {name}" for name in reversed(names[:-1]))
    question = f"\nQuestion: What is the value of {names[-1]}?\nAnswer: {names[-1]}"
    return Entry(chain_statements(names, value), question.encode(), f"{hops} = {value}\n".encode())


def ruler_chain_entry(names: Sequence[str], value: str) -> Entry:
    """Return a chain as RULER asks for it: all names that hold a value."""
    question = f"\nQuestion: Find all variables that are assigned the value {value}.\nAnswer:"
    return Entry(
        chain_statements(names, value), question.encode(), f" {' '.join(names)}\n".encode()
    )


def needles_that_fit(length: int, wanted: int) -> int:
    """Return how many needles a context holds besides prose: all wanted ones, or fewer."""
    return max(1, min(wanted, int(_NEEDLE_SHARE * (length - 160) / 56)))


def multi_needle(
    rng: random.Random, length: int, depth: float, source: TextSource, *, needles: int
) -> NeedleSample:
    """Hide several needles in prose and ask for one; fewer than `needles` in a short context."""
    entries = _needles(rng, source, needles_that_fit(length, needles))
    name = "single_needle" if needles == 1 else f"multi_needle_{needles}"
    return _sample(rng, Scene(name, entries), length, depth, source)


def single_needle(
    rng: random.Random, length: int, depth: float, source: TextSource
) -> NeedleSample:
    """Hide one needle in prose."""
    return multi_needle(rng, length, depth, source, needles=1)


def needle_haystack(
    rng: random.Random, length: int, depth: float, source: TextSource
) -> NeedleSample:
    """Hide a needle among nothing but needles."""
    entries = _needles(rng, source, max(2, length // 44))
    return _sample(rng, Scene("needle_haystack", entries, separator=b" "), length, depth, source)


def key_value_lines(
    rng: random.Random, length: int, depth: float, source: TextSource
) -> NeedleSample:
    """List keys and values of 8 hexadecimal digits and ask for one value."""
    keys = distinct(partial(hexadecimal, rng, 8), max(2, length // 19))
    entries = tuple(
        Entry(
            (f"{key}: {value}".encode(),),
            f"\nQuestion: What is the value for {key}?\nAnswer:".encode(),
            f" {value}\n".encode(),
        )
        for key, value in ((key, hexadecimal(rng, 8)) for key in keys)
    )
    scene = Scene("key_value_lines", entries, tail=b"\n", separator=b"\n")
    return _sample(rng, scene, length, depth, source)


def json_uuids(rng: random.Random, length: int, depth: float, source: TextSource) -> NeedleSample:
    """Write a JSON object of UUIDs and ask for the value of one key."""
    keys = distinct(partial(uuid, rng), max(2, length // 80))
    entries = tuple(json_entry(key, uuid(rng)) for key in keys)
    scene = Scene("json_uuids", entries, b"JSON data:\n{", b"}\n", separator=b", ")
    return _sample(rng, scene, length, depth, source)


def facts(rng: random.Random, length: int, depth: float, source: TextSource) -> NeedleSample:
    """Plant facts in held-out wordings and ask for one; short contexts hold fewer of them."""
    return _facts("facts", HELD_OUT, rng, length, depth, source)


def facts_unseen(
    rng: random.Random, length: int, depth: float, source: TextSource
) -> NeedleSample:
    """Do as `facts` does, in the unseen wordings."""
    return _facts("facts_unseen", UNSEEN, rng, length, depth, source)


def variable_chains(
    rng: random.Random, length: int, depth: float, source: TextSource, *, hops: int = 2
) -> NeedleSample:
    """Hide chains of assignments in prose and ask for the value at the end of one."""
    chains = min(_CHAINS, max(1, length // 128))
    names = distinct(partial(_variable, rng), chains * (hops + 1))
    entries = tuple(
        chain_entry(names[i : i + hops + 1], digits(rng, 5))
        for i in range(0, len(names), hops + 1)
    )
    return _sample(rng, Scene("variable_chains", entries), length, depth, source)


def ruler_variable_tracking(
    rng: random.Random, length: int, depth: float, source: TextSource, *, hops: int = 2
) -> NeedleSample:
    """Hide one chain in RULER's noise and ask for all its names. For training only."""
    names = distinct(partial(_variable, rng), hops + 1)
    scene = Scene("ruler_variable_tracking", (ruler_chain_entry(names, digits(rng, 5)),))
    noise = TextSource((cut_from(RULER_NOISE.encode()),), (1.0,), source.words)
    return _sample(rng, scene, length, depth, noise)


def copy(rng: random.Random, length: int, depth: float, source: TextSource) -> NeedleSample:
    """List random lines and ask for the rest of one. For training only: it teaches induction."""
    size = rng.randint(10, 40)
    lines = distinct(partial(letters, rng, size), max(2, length // (size + 1)))
    entries = tuple(
        Entry((line.encode(),), b"\n" + line[:5].encode(), line[5:].encode() + b"\n")
        for line in lines
    )
    scene = Scene("copy", entries, tail=b"\n", separator=b"\n")
    return _sample(rng, scene, length, depth, source)


TASKS: dict[str, Generator] = {
    "single_needle": single_needle,
    "multi_needle_16": partial(multi_needle, needles=16),
    "multi_needle_64": partial(multi_needle, needles=64),
    "needle_haystack": needle_haystack,
    "key_value_lines": key_value_lines,
    "json_uuids": json_uuids,
    "facts": facts,
    "facts_unseen": facts_unseen,
    "variable_chains": variable_chains,
}
"""The evaluated tasks by name."""

TRAINING_TASKS: dict[str, Generator] = {
    "ruler_variable_tracking": ruler_variable_tracking,
    "copy": copy,
}
"""Tasks that only training uses."""


def make_sample(
    task: str, length: int, depth: float, seed: int | str, source: TextSource | None = None
) -> NeedleSample:
    """Make the sample of a task that belongs to a seed.

    Parameters
    ----------
    task
        A key of `TASKS` or `TRAINING_TASKS`.
    length
        Bytes of context, question and answer together; at least 512.
    depth
        Place of the needle, 0 to 1.
    seed
        Equal seeds give equal samples.
    source
        Prose and words; held-out text by default.

    Returns
    -------
    NeedleSample
        The question, its context and its answer.
    """
    generator = (TASKS | TRAINING_TASKS).get(task)
    if generator is None:
        raise ValueError(f"unknown task {task!r}, expected one of {[*TASKS, *TRAINING_TASKS]}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth lies between 0 and 1, got {depth}")
    rng = random.Random(f"{task} {length} {depth} {seed}")
    return generator(rng, length, depth, source or held_out_source())


def _needles(rng: random.Random, source: TextSource, count: int) -> tuple[Entry, ...]:
    statement = rng.choice(NEEDLE_STATEMENTS)
    question = rng.choice(NEEDLE_QUESTIONS)
    keys = distinct(partial(needle_key, rng, source.words), count)
    return tuple(
        needle_entry(statement, question, _ATTRIBUTE, key, digits(rng, 7)) for key in keys
    )


def _facts(
    name: str,
    templates: Templates,
    rng: random.Random,
    length: int,
    depth: float,
    source: TextSource,
) -> NeedleSample:
    count = max(2, min(_FACTS, (length - 200) // 100))
    found = random_facts(rng, templates, source.content_words, count)
    return _sample(rng, Scene(name, tuple(map(fact_entry, found))), length, depth, source)


def _variable(rng: random.Random) -> str:
    return letters(rng, 5, string.ascii_uppercase)


def _sample(
    rng: random.Random, scene: Scene, length: int, depth: float, source: TextSource
) -> NeedleSample:
    """Ask for the first entry."""
    layout = assemble(rng, scene, [0], length, source, depths={0: depth})
    ((question, answer),) = layout.questions
    return NeedleSample(scene.task, layout.context, question, answer, depth, layout.offset)
