"""Prose that hides the needles: training sources, held-out sources and their vocabularies.

Training draws from the Python documentation topics, the docstrings of the standard library,
random-word sentences, RULER's noise and random scripts. Evaluation draws from documentation
topics that training never sees and from the bundled Jargon File. Documentation topics are split
by name, not by size, so that the split is the same in every Python version.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from pydoc_data.topics import topics as _TOPICS

from .templates import HELD_OUT
from .unseen_templates import UNSEEN
from .values import foreign_word

RULER_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)

# Topics sorting at or after this name are held out: the last fifth of the text.
_FIRST_HELD_OUT_TOPIC = "try"
_DOCSTRING_BYTES = 3_000_000
_SKIPPED_FOLDERS = {"encodings", "idlelib", "pydoc_data", "site-packages", "test", "tests"}
# Lines at least this long that also occur in held-out text are dropped from the training text;
# shorter ones are headings and idioms that any technical prose shares.
_SHARED_LINE_LENGTH = 32
_FUNCTION_WORDS = 150
_CONTINUATION = bytes(range(0x80, 0xC0))

Cutter = Callable[[random.Random, int], bytes]


@dataclass(frozen=True)
class TextSource:
    """Prose of any length, and the words that keys, values and names are made from.

    Attributes
    ----------
    cutters
        Functions of a random generator and a length that return exactly that many bytes.
    weights
        How often each cutter is used.
    words
        Lower-case words of 3 to 12 letters, most frequent first.
    """

    cutters: tuple[Cutter, ...]
    weights: tuple[float, ...]
    words: tuple[str, ...]

    def prose(self, rng: random.Random, length: int) -> bytes:
        """Return `length` bytes of prose."""
        (cutter,) = rng.choices(self.cutters, self.weights)
        return cutter(rng, length)

    @cached_property
    def content_words(self) -> tuple[str, ...]:
        """Words without the most frequent ones, which no one would choose as a value."""
        return self.words[_FUNCTION_WORDS:]


def cut_from(text: bytes) -> Cutter:
    """Cut a window at a random place; the text starts again where it ends."""

    def cutter(rng: random.Random, length: int) -> bytes:
        start = rng.randrange(len(text))
        window = text[start : start + length]
        while len(window) < length:
            window += text[: length - len(window)]
        return _without_halves(window)

    return cutter


def _without_halves(window: bytes) -> bytes:
    """Put spaces where a cut left half of a UTF-8 character at either end."""
    whole = window.lstrip(_CONTINUATION)
    kept = whole.decode("utf-8", "ignore").encode()
    return b" " * (len(window) - len(whole)) + kept + b" " * (len(whole) - len(kept))


def random_sentences(words: tuple[str, ...]) -> Cutter:
    """Write sentences of random words, the frequent ones more often."""
    cumulative = []
    total = 0.0
    for rank in range(len(words)):
        total += 1.0 / (rank + 20)
        cumulative.append(total)

    def cutter(rng: random.Random, length: int) -> bytes:
        drawn = rng.choices(words, cum_weights=cumulative, k=length // 4 + 16)
        sentences: list[str] = []
        start = size = 0
        while size < length:
            stop = start + rng.randint(4, 16)
            end = rng.choice((". ", ". ", ".\n", "? ", ", "))
            sentence = " ".join(drawn[start:stop]).capitalize() + end
            sentences.append(sentence)
            size += len(sentence)
            start = stop
        return "".join(sentences).encode()[:length]

    return cutter


def random_scripts(rng: random.Random, length: int) -> bytes:
    """Write words of letters beyond ASCII, so that no byte value is left untrained."""
    words: list[bytes] = []
    size = 0
    while size < length:
        word = (foreign_word(rng) + rng.choice((" ", " ", " ", ". ", "\n"))).encode()
        words.append(word)
        size += len(word)
    return _without_halves(b"".join(words)[:length])


@cache
def held_out_texts() -> tuple[bytes, ...]:
    """Return the texts that training never sees: documentation topics and the Jargon File."""
    topics = "\n".join(_TOPICS[k] for k in sorted(_TOPICS) if k >= _FIRST_HELD_OUT_TOPIC)
    jargon = resources.files("longctx_models").joinpath("data", "jargon_file.txt")
    return topics.encode(), jargon.read_bytes()


@cache
def training_texts() -> tuple[bytes, ...]:
    """Return the fixed texts of training: documentation topics and docstrings."""
    held_out_lines = {
        line
        for text in held_out_texts()
        for line in map(bytes.strip, text.split(b"\n"))
        if len(line) >= _SHARED_LINE_LENGTH
    }
    topics = "\n".join(_TOPICS[k] for k in sorted(_TOPICS) if k < _FIRST_HELD_OUT_TOPIC)
    return tuple(
        b"\n".join(line for line in text.split(b"\n") if line.strip() not in held_out_lines)
        for text in (topics.encode(), _docstrings(_DOCSTRING_BYTES))
    )


@cache
def training_source() -> TextSource:
    """Return the text source of training."""
    topics, docstrings = training_texts()
    kept_out = (templates.words() | templates.frame_words() for templates in (HELD_OUT, UNSEEN))
    words = _words((topics, docstrings), excluded=frozenset().union(*kept_out))
    return TextSource(
        cutters=(
            cut_from(topics),
            cut_from(docstrings),
            random_sentences(words),
            cut_from(RULER_NOISE.encode() * 1000),
            random_scripts,
        ),
        weights=(0.38, 0.22, 0.25, 0.10, 0.05),
        words=words,
    )


@cache
def held_out_source() -> TextSource:
    """Return the text source of evaluation; its words come from the Jargon File alone."""
    texts = held_out_texts()
    return TextSource(
        cutters=tuple(cut_from(text) for text in texts),
        weights=(0.5, 0.5),
        words=_words(texts[1:]),
    )


def _docstrings(limit: int) -> bytes:
    """Collect the longer docstrings of the standard library, in order of file name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[bytes] = []
    size = 0
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if _SKIPPED_FOLDERS.intersection(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) > 80:
                    found.append(docstring.encode("utf-8", "replace"))
                    size += len(found[-1])
        if size > limit:
            break
    return b"\n\n".join(found)


def _words(texts: Iterable[bytes], excluded: Collection[str] = ()) -> tuple[str, ...]:
    """Count the words of some texts; words that inflect to an excluded one are left out too."""
    left_out = {word[:size] for word in excluded for size in range(len(word) - 3, len(word) + 1)}
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"\b[a-z]{3,12}\b", text.decode("utf-8", "ignore").lower()))
    common = [(-n, word) for word, n in counts.items() if n >= 2 and word not in left_out]
    return tuple(word for _, word in sorted(common))
