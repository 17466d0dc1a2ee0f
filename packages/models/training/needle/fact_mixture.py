"""Training facts in free wording.

Some dozens of English templates would be learned by heart. They are therefore mixed with thousands
of English phrases (`wordings`), and most attributes and many verbs, copulas and noun phrases are
random words: the only way to answer is to match the words of a question with those of a statement,
whatever they are. Where nothing else marks where a value of
several words begins, the word before it is one that English uses there.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import wordings

from longctx_models.evaluation.needle.facts import (
    Fact,
    capitalised,
    entity,
    frame,
    noun_phrase,
)
from longctx_models.evaluation.needle.retired_templates import RETIRED
from longctx_models.evaluation.needle.scenes import Entry, Scene
from longctx_models.evaluation.needle.tasks import fact_entry
from longctx_models.evaluation.needle.templates import HELD_OUT, TRAINING, Templates
from longctx_models.evaluation.needle.text import TextSource
from longctx_models.evaluation.needle.unseen_templates import UNSEEN
from longctx_models.evaluation.needle.values import (
    distinct,
    fact_value,
    foreign_word,
    identifier,
    person,
    pseudoword,
)

_AUXILIARIES = (
    *("is", "was", "will be", "has been", "had been", "may be", "can be", "could be", "is being"),
    *("should be", "must have been", "would have been", "seems to be", "is to be", "might be"),
    *("has always been", "is not yet", "has just been", "is going to be", "will have been"),
)
_ADVERBS = (
    *("actually", "probably", "definitely", "usually", "presently", "formally", "certainly"),
    *("supposedly", "clearly", "indeed", "surely", "merely", "originally", "secretly", "again"),
)
_BEFORE_VALUE = (
    *("as", "to", "at", "by", "in", "to be", "as being", "for", "with", "on", "into", "than"),
    *("under", "upon", "to", "as", "at", "to be", "from", "near", "called", "around"),
)
_PREPOSITIONS = ("in", "at", "with", "to", "from", "by", "on", "near", "under", "of", "behind")
_INTERROGATIVES = ("What", "What", "Where", "Who", "When", "Which one", "How much")
# "What does" begins questions about verbs too: only what follows tells them apart.
_OPENERS = (
    *("What does", "What does", "What did", "What do", "How does", "How would", "How do", "Can"),
    *("Could", "Would", "Will", "Do", "Did", "Does", "Has", "Is there", "Where does", "Who has"),
    *("In this document", "From the above", "Please", "Let me", "I want", "We", "You", "Which"),
)
_FOREIGN_SHARE = 0.05
_FIRST_PERSON = ("my {a}", "our {a}", "the {a}", "this {a}")


@dataclass(frozen=True)
class Claim:
    """What a fact says; `alone` tells that no other fact nearby has the same attribute."""

    attribute: str
    subject: str
    value: str
    alone: bool


class FactWriter:
    """Words facts; every instance has its own habits.

    Parameters
    ----------
    rng
        Source of every random choice.
    source
        Words to use.
    """

    def __init__(self, rng: random.Random, source: TextSource) -> None:
        self.rng, self.words = rng, source.words
        (kind,) = rng.choices(
            (
                self._with_copula,
                self._without_subject,
                self._with_english_verb,
                self._with_random_verb,
                self._value_first,
            ),
            (0.53, 0.06, 0.22, 0.13, 0.06),
        )
        self.write: Callable[[Claim], Fact] = kind
        self._pattern = self._noun_phrase_pattern()
        self._copula = self._any_copula()
        self._keeps_copula = rng.random() < 0.5

    def _with_copula(self, claim: Claim) -> Fact:
        rng = self.rng
        asked_pattern = self._pattern if rng.random() < 0.35 else self._noun_phrase_pattern()
        stated = noun_phrase(self._pattern, claim.attribute, claim.subject)
        asked = noun_phrase(asked_pattern, claim.attribute, claim.subject)
        if claim.alone and rng.random() < 0.1:
            asked = f"the {claim.attribute}"
        return self._copular(stated, asked, claim.value)

    def _without_subject(self, claim: Claim) -> Fact:
        # The subject becomes part of the attribute, so that no two facts answer one question.
        attribute = f"{claim.subject.removeprefix('the ')} {claim.attribute}"
        phrase = self.rng.choice(_FIRST_PERSON).format(a=attribute)
        return self._copular(phrase, phrase, claim.value)

    def _with_english_verb(self, claim: Claim) -> Fact:
        rng, subject = self.rng, claim.subject
        if rng.random() < 0.35:
            stated, asked = rng.choice(self._templates().verb_frames)
        else:
            stated, asked = wordings.verb_frame(rng)
        statement = stated.format(e=subject, w=claim.attribute, v=claim.value)
        question = asked.format(e=subject, w=claim.attribute)
        if rng.random() < 0.15:
            question = self._followed(question[:-1]) + "?"
        return Fact(self._framed(statement), capitalised(question), claim.value)

    def _with_random_verb(self, claim: Claim) -> Fact:
        rng, subject, value = self.rng, claim.subject, claim.value
        *thing, verb = claim.attribute.split()
        asker = rng.choice(_INTERROGATIVES)
        preposition = rng.choice(_PREPOSITIONS)
        # The object of the verb, if there is one, stands between it and the preposition, which
        # the question may leave out: "lost the key near", "Where did .. lose the key?".
        if thing:
            stated = f" the {' '.join(thing)} {preposition}"
        else:
            stated = f" {preposition}" if rng.random() < 0.7 else ""
        asked = stated.removesuffix(f" {preposition}") if rng.random() < 0.5 else stated
        past = self._past(verb)
        statement, question = rng.choice(
            (
                (f"{subject} {verb}s{stated} {value}", f"{asker} does {subject} {verb}{asked}?"),
                (f"{subject} {past}{stated} {value}", f"{asker} did {subject} {verb}{asked}?"),
                (
                    f"{subject} will {verb}{stated} {value}",
                    f"{asker} will {subject} {verb}{asked}?",
                ),
                (f"{subject} can {verb}{stated} {value}", f"{asker} can {subject} {verb}{asked}?"),
                (f"{subject} is {past}{stated} {value}", f"{asker} is {subject} {past}{asked}?"),
                (f"{subject} was {past} by {value}", f"Who {past} {subject}?"),
                (f"{subject} is {verb}ed by {value}", f"Who {verb}s {subject}?"),
            )
        )
        return Fact(self._framed(statement), capitalised(question), value)

    def _value_first(self, claim: Claim) -> Fact:
        phrase = noun_phrase(self._pattern, claim.attribute, claim.subject)
        verb = self.rng.choice(("is", "was", "became", "remains"))
        value = capitalised(claim.value)
        asker = self.rng.choice(("What", "Who"))
        return Fact(f"{value} {verb} {phrase}.", f"{asker} is {phrase}?", value)

    def _copular(self, stated: str, asked: str, value: str) -> Fact:
        copula = self._copula if self._keeps_copula else self._any_copula()
        glue = "" if copula == ":" else " "
        return Fact(self._framed(f"{stated}{glue}{copula} {value}"), self._question(asked), value)

    def _noun_phrase_pattern(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.3:
            return rng.choice(self._templates().noun_phrases)
        if kind < 0.7:
            return rng.choice(wordings.NOUN_PHRASES)
        word, preposition = self._word(), rng.choice(_PREPOSITIONS)
        return rng.choice(
            (
                f"the {{a}} {preposition} {{e}}",
                f"the {{a}} {word}ed {preposition} {{e}}",
                f"the {{a}} {word}ing {preposition} {{e}}",
                f"the {{a}} that {{e}} {word}s",
                f"the {{a}} which {{e}} {word}ed",
                f"the {word} {{a}} of {{e}}",
                f"{{e}}'s {word} {{a}}",
            )
        )

    def _any_copula(self) -> str:
        """Return words between a noun phrase and a value, never ones that are held out."""
        rng = self.rng
        kind = rng.random()
        auxiliary, before = rng.choice(_AUXILIARIES), rng.choice(_BEFORE_VALUE)
        if kind < 0.22:
            copula = rng.choice(self._templates().copulas)
        elif kind < 0.6:
            copula = wordings.copula(rng)
        elif kind < 0.64:
            copula = auxiliary
        elif kind < 0.72:
            adverb = f"{self._word()}ly" if rng.random() < 0.6 else rng.choice(_ADVERBS)
            copula = f"{auxiliary} {adverb}"
        elif kind < 0.82:
            copula = f"{auxiliary} {self._past(self._word())} {before}"
        elif kind < 0.89:
            copula = f"{self._word()}s"
        elif kind < 0.95:
            copula = f"{self._word()}s {before}"
        else:
            filler = (self._word() for _ in range(rng.randint(1, 3)))
            copula = " ".join((*filler, before))
        held_out = (*HELD_OUT.copulas, *UNSEEN.copulas)
        return self._any_copula() if copula in held_out else copula

    def _past(self, verb: str) -> str:
        """Return a past form; English has so many irregular ones that endings vary."""
        if self.rng.random() < 0.6:
            return f"{verb}ed"
        return self.rng.choice((verb, f"{verb}en", f"{verb[:-1]}t", f"{verb[:-1]}d", f"{verb}n"))

    def _framed(self, statement: str) -> str:
        """Open and close a statement with templates, other English or, rarely, random words."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.55:
            return frame(rng, self._templates(), statement)
        if kind < 0.85:
            opening = rng.choice(wordings.OPENINGS) if rng.random() < 0.6 else ""
            closing = rng.choice(wordings.CLOSINGS) if rng.random() < 0.4 else "."
            return capitalised(opening + statement) + closing
        words = " ".join(self._word() for _ in range(rng.randint(2, 5)))
        if rng.random() < 0.5:
            return f"{capitalised(words)}{rng.choice((', ', ': ', ' that '))}{statement}."
        return f"{capitalised(statement)}{rng.choice((', ', '; '))}{words}."

    def _question(self, asked: str) -> str:
        """Ask for a noun phrase; what comes before it and after it must not matter."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.28:
            return capitalised(rng.choice(self._templates().questions).format(np=asked))
        if kind < 0.68:
            return capitalised(wordings.question(rng).format(np=asked))
        words = [self._word() for _ in range(rng.randint(1, 5))]
        if kind < 0.9:
            words.insert(0, rng.choice(_OPENERS))
        before = " ".join(words) + rng.choice(("", "", ",", ":"))
        return f"{capitalised(before)} {self._followed(asked)}{rng.choice('??.')}"

    def _followed(self, asked: str) -> str:
        """Put random words after what is asked for, some of the time."""
        rng = self.rng
        if rng.random() < 0.65:
            return asked
        words = " ".join(self._word() for _ in range(rng.randint(1, 4)))
        return f"{asked}{rng.choice((' ', ', ', '; ', ': ', ' - '))}{words}"

    def _templates(self) -> Templates:
        return self.rng.choices((TRAINING, RETIRED), (0.65, 0.35))[0]

    def _word(self) -> str:
        return self.rng.choice(self.words)


def fact_scene(rng: random.Random, source: TextSource, length: int) -> Scene:
    """Plant facts that share attributes and subjects, in one wording or in many.

    Some scenes are lists of nothing but facts: many questions for few bytes.
    """
    dense = rng.random() < (0.4 if length <= 2048 else 0.25)
    if dense:
        count = length // 64
    else:
        most = max(2, min(64, length // 160))
        fewest = 1 if rng.random() < 0.3 else min(8, most)
        count = int(math.exp(rng.uniform(math.log(fewest), math.log(most + 0.99))))
    attributes = distinct(
        partial(_attribute, rng, source), rng.choice((2, 4, 1 + count // 4, count))
    )
    subjects = distinct(partial(_subject, rng, source), 1 + count // rng.choice((1, 1, 2, 3, 6)))
    pairs = distinct(lambda: (rng.choice(attributes), rng.choice(subjects)), count)
    uses = Counter(attribute for attribute, _ in pairs)
    writer = FactWriter(rng, source)
    same_writer = rng.random() < 0.35
    short_form = rng.random() < 0.15
    lower_case = rng.random() < 0.05
    # By question, because two facts must not answer the same one.
    entries: dict[str, Entry] = {}
    for attribute, subject in pairs:
        if not same_writer:
            writer = FactWriter(rng, source)
        foreign = rng.random() < _FOREIGN_SHARE
        value = foreign_word(rng) if foreign else fact_value(rng, source.content_words)
        fact = writer.write(Claim(attribute, subject, value, uses[attribute] == 1))
        if lower_case:
            fact = Fact(fact.statement, fact.question.lower(), fact.answer)
        entries[fact.question] = _short_entry(fact) if short_form else fact_entry(fact)
    separator = rng.choice((b"\n", b" ")) if dense else None
    return Scene("fact", tuple(entries.values()), separator=separator)


def _short_entry(fact: Fact) -> Entry:
    return Entry(
        (fact.statement.encode(),),
        f"\nQ: {fact.question}\nA:".encode(),
        f" {fact.answer}\n".encode(),
    )


def _attribute(rng: random.Random, source: TextSource) -> str:
    if rng.random() < 0.25:
        return rng.choice(rng.choice((TRAINING, RETIRED)).attributes)
    return " ".join(rng.choice(source.words) for _ in range(rng.choice((1, 2, 2, 2, 3, 4))))


def _subject(rng: random.Random, source: TextSource) -> str:
    kind = rng.random()
    templates = rng.choice((TRAINING, RETIRED))
    if kind < 0.25:
        return entity(rng, templates)
    if kind < 0.30:
        return f"{entity(rng, templates)} and {entity(rng, templates)}"
    word, other = rng.choice(source.words), rng.choice(source.words)
    return rng.choice(
        (
            word,
            f"the {word} {other}",
            f"the {word} {other}",
            f"the {word}",
            f"{word} {other}",
            pseudoword(rng).capitalize(),
            pseudoword(rng).capitalize(),
            f"{word.capitalize()} {pseudoword(rng).capitalize()}",
            person(rng),
            f"{word} {rng.randrange(1, 1000)}",
            f"{word} {identifier(rng)}",
            f"{word} {pseudoword(rng).capitalize()}",
            f"the {pseudoword(rng).capitalize()}",
            f"the {word} of {other}",
            foreign_word(rng),
        )
    )
