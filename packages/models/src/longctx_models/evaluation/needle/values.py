"""Keys and values: random strings of the kinds that people put into questions."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"
_ACCENTED = "áéíóúäöüñçøåèêž"
_MONTHS = ("January", "March", "April", "June", "July", "August", "October", "November")

# Letters beyond ASCII that a user's text may hold: Latin, Greek, Cyrillic, CJK, kana, emoji.
_SCRIPTS = (
    (0x00E0, 0x017E),
    (0x00E0, 0x00FF),
    (0x03B1, 0x03C9),
    (0x0430, 0x044F),
    (0x4E00, 0x9FA5),
    (0x3041, 0x3096),
    (0x1F600, 0x1F64F),
)

T = TypeVar("T", bound=Hashable)


def letters(rng: random.Random, length: int, alphabet: str = string.ascii_lowercase) -> str:
    """Return a string of `length` letters of an alphabet."""
    return "".join(rng.choices(alphabet, k=length))


def digits(rng: random.Random, length: int) -> str:
    """Return a number of `length` digits that does not start with 0."""
    return str(rng.randrange(10 ** (length - 1), 10**length))


def hexadecimal(rng: random.Random, length: int) -> str:
    """Return a string of `length` hexadecimal digits."""
    return f"{rng.getrandbits(4 * length):0{length}x}"


def uuid(rng: random.Random) -> str:
    """Return 32 hexadecimal digits in UUID form; version bits are random too."""
    h = hexadecimal(rng, 32)
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def pseudoword(rng: random.Random) -> str:
    """Return a pronounceable word that is in no dictionary; a few carry an accent."""
    word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 4)))
    word += rng.choice(("", rng.choice(_CONSONANTS)))
    if rng.random() < 0.04:
        word = word[:1] + rng.choice(_ACCENTED) + word[2:]
    return word


def foreign_word(rng: random.Random) -> str:
    """Return a word of letters beyond ASCII, or one that mixes accented and plain letters."""
    low, high = rng.choice(_SCRIPTS)
    word = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))
    if rng.random() < 0.6:
        return word
    return "".join(letter + rng.choice(_VOWELS) for letter in word)


def needle_key(rng: random.Random, words: Sequence[str]) -> str:
    """Return a word, two hyphenated words or a pseudoword."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(words)
    if kind < 0.8:
        return f"{rng.choice(words)}-{rng.choice(words)}"
    return pseudoword(rng)


def identifier(rng: random.Random) -> str:
    """Return a code such as ``KX319`` or ``B44``."""
    return letters(rng, rng.randint(1, 3), string.ascii_uppercase) + digits(rng, rng.randint(2, 4))


def person(rng: random.Random) -> str:
    """Return a first and a last name that nobody has."""
    return f"{pseudoword(rng).capitalize()} {pseudoword(rng).capitalize()}"


def _dashed(rng: random.Random, words: Sequence[str]) -> str:
    size = rng.randint(2, 4)
    return "-".join(digits(rng, size) for _ in range(rng.randint(2, 3)))


def _dotted(rng: random.Random, words: Sequence[str]) -> str:
    return ".".join(str(rng.randrange(256)) for _ in range(rng.randint(2, 4)))


def _amount(rng: random.Random, words: Sequence[str]) -> str:
    prefix, suffix = rng.choice(
        (("$", ""), ("", " dollars"), ("", "%"), ("", " kg"), ("", " miles"), ("", ""))
    )
    return f"{prefix}{rng.randrange(1, 100000):,}{suffix}"


def _mixed(rng: random.Random, words: Sequence[str]) -> str:
    return letters(rng, rng.randint(5, 10), string.ascii_letters + string.digits)


_FACT_VALUES: tuple[tuple[float, Callable[[random.Random, Sequence[str]], str]], ...] = (
    (0.16, lambda rng, words: digits(rng, rng.randint(2, 8))),
    (0.10, lambda rng, words: rng.choice(words)),
    (0.12, lambda rng, words: f"{rng.choice(words)} {rng.choice(words)}"),
    (0.04, lambda rng, words: " ".join(rng.choice(words) for _ in range(3))),
    (0.04, lambda rng, words: f"the {rng.choice(words)} {rng.choice(words)}"),
    (0.03, lambda rng, words: f"{rng.choice(words)}-{rng.choice(words)}"),
    (0.08, lambda rng, words: pseudoword(rng).capitalize()),
    (0.08, lambda rng, words: person(rng)),
    (0.08, lambda rng, words: rng.choice(words) + digits(rng, rng.randint(1, 4))),
    (0.06, lambda rng, words: identifier(rng)),
    (0.07, _mixed),
    (0.05, _dashed),
    (0.02, _dotted),
    (0.02, lambda rng, words: f"{rng.randrange(24)}:{rng.randrange(60):02d}"),
    (0.02, lambda rng, words: f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {digits(rng, 4)}"),
    (0.03, _amount),
)


def fact_value(rng: random.Random, words: Sequence[str]) -> str:
    """Return the value of a planted fact: a number, word, name, code, date or amount."""
    (make,) = rng.choices([f for _, f in _FACT_VALUES], [w for w, _ in _FACT_VALUES])
    return make(rng, words)


def distinct(make: Callable[[], T], count: int) -> list[T]:
    """Call `make` until `count` different results came, or fewer where they run out."""
    found: dict[T, None] = {}
    for _ in range(4 * count + 50):
        if len(found) >= count:
            break
        found[make()] = None
    return list(found)
