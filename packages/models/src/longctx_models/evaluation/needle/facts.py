"""Facts in free wording: made from templates, planted in any text, asked for by a question."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .placement import insert_at_boundaries
from .templates import Templates
from .values import fact_value, identifier, person, pseudoword

_OPENING_SHARE = 0.4
_CLOSING_SHARE = 0.2


@dataclass(frozen=True)
class Fact:
    """A stated fact, a question about it and the answer, which is a part of the statement."""

    statement: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.statement:
            raise ValueError(f"the answer {self.answer!r} is not in {self.statement!r}")


def question_prompt(question: str) -> bytes:
    r"""Return the bytes that ask a question in the form the needle model was trained on.

    They follow the context directly; the model then writes a space, the answer and a line end.

    >>> question_prompt("What is the wifi password of the blue house?")
    b'\nQuestion: What is the wifi password of the blue house?\nAnswer:'
    """
    return f"\nQuestion: {question.strip()}\nAnswer:".encode()


def plant(text: bytes, facts: Sequence[Fact], depths: Sequence[float], length: int) -> bytes:
    """Hide facts in a text.

    The text is cut so that everything fits into `length` bytes, never inside a UTF-8 character;
    a short text is not repeated, so the result may be shorter. Each statement goes to the end of
    a sentence or line next to its depth. No beginning-of-sequence byte is added: the tokenizer
    prepends it.

    Parameters
    ----------
    text
        UTF-8 text of any kind.
    facts
        What to plant.
    depths
        For each fact, 0 for the beginning to 1 for the end.
    length
        Most bytes to return. A question asked afterwards comes on top.

    Returns
    -------
    bytes
        The text with the facts in it.
    """
    if len(facts) != len(depths):
        raise ValueError(f"{len(facts)} facts need as many depths, got {len(depths)}")
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths lie between 0 and 1, got {list(depths)}")
    statements = [fact.statement.encode() for fact in facts]
    room = length - sum(len(statement) + 1 for statement in statements)
    if room < 0:
        raise ValueError(f"{len(facts)} facts take {length - room} bytes, more than {length}")
    cut = text[:room].decode("utf-8", "ignore").encode() if len(text) > room else text
    spans = insert_at_boundaries(cut, list(zip(depths, statements, strict=True)))
    return b"".join(span for span, _ in spans)


def entity(rng: random.Random, templates: Templates) -> str:
    """Return a person, a thing or a place that a fact can be about."""
    adjective, noun = rng.choice(templates.adjectives), rng.choice(templates.nouns)
    name = rng.choice(templates.names)
    return rng.choice(
        (
            name,
            name,
            f"the {adjective} {noun}",
            f"the {adjective} {noun}",
            f"the {noun}",
            f"{noun} {identifier(rng)}",
            f"{noun} {name}",
            f"the {pseudoword(rng).capitalize()}",
            person(rng),
        )
    )


def fact_about(
    rng: random.Random, templates: Templates, attribute: str, subject: str, value: str
) -> Fact:
    """State that an attribute of a subject has a value, in a random wording of `templates`."""
    pattern = rng.choice(templates.noun_phrases)
    # Most people repeat the phrase that they read; some turn it round.
    asked = pattern if rng.random() < 0.7 else rng.choice(templates.noun_phrases)
    copula = rng.choice(templates.copulas)
    glue = "" if copula == ":" else " "
    statement = noun_phrase(pattern, attribute, subject) + glue + copula + " " + value
    question = rng.choice(templates.questions)
    return Fact(
        frame(rng, templates, statement),
        capitalised(question.format(np=noun_phrase(asked, attribute, subject))),
        value,
    )


def fact_with_verb(
    rng: random.Random,
    verb_frame: tuple[str, str],
    templates: Templates,
    subject: str,
    thing: str,
    value: str,
) -> Fact:
    """State what a subject does, by a pair of a statement and a question."""
    statement, question = verb_frame
    return Fact(
        frame(rng, templates, statement.format(e=subject, w=thing, v=value)),
        capitalised(question.format(e=subject, w=thing)),
        value,
    )


def random_facts(
    rng: random.Random, templates: Templates, words: Sequence[str], count: int
) -> list[Fact]:
    """Return facts whose first one is easily mistaken for others.

    A quarter of the rest share its attribute, a quarter its subject.
    """
    attribute, subject = rng.choice(templates.attributes), entity(rng, templates)
    pairs = {(attribute, subject): None}
    subjects = {subject}
    while len(pairs) < count:
        kind = rng.random()
        other_attribute = attribute if kind < 0.25 else rng.choice(templates.attributes)
        other_subject = subject if 0.25 <= kind < 0.5 else entity(rng, templates)
        # "the house" beside "the blue house" would make the question ambiguous.
        if any(_overlap(other_subject, known) for known in subjects):
            continue
        subjects.add(other_subject)
        pairs[other_attribute, other_subject] = None
    facts = []
    frames = list(templates.verb_frames)
    rng.shuffle(frames)
    for attribute, subject in pairs:
        value = fact_value(rng, words)
        # A verb frame is used once, so that no two facts answer one question.
        if frames and rng.random() < 0.25:
            thing = attribute.split()[-1]
            facts.append(fact_with_verb(rng, frames.pop(), templates, subject, thing, value))
        else:
            facts.append(fact_about(rng, templates, attribute, subject, value))
    return facts


def noun_phrase(pattern: str, attribute: str, subject: str) -> str:
    """Join an attribute and a subject, without a doubled article."""
    return pattern.format(a=attribute, e=subject).replace("the the ", "the ")


def frame(rng: random.Random, templates: Templates, statement: str) -> str:
    """Put an opening before and a closing after a statement."""
    opening = rng.choice(templates.openings) if rng.random() < _OPENING_SHARE else ""
    closing = rng.choice(templates.closings) if rng.random() < _CLOSING_SHARE else "."
    return capitalised(opening + statement) + closing


def _overlap(subject: str, other: str) -> bool:
    return subject != other and (subject in other or other in subject)


def capitalised(text: str) -> str:
    """Return a text whose first letter is a capital."""
    return text[:1].upper() + text[1:]
