"""Wordings of facts: the training set and the held-out one, which share no template and no noun.

`unseen_templates` holds another test set, as different from both; `retired_templates` one that was
a test set once and is trained on since.

A wording says how a fact is stated and how it is asked for. Slots: ``{a}`` an attribute,
``{e}`` an entity, ``{v}`` the value, ``{np}`` a noun phrase made of attribute and entity,
``{w}`` another word. The empty opening and the plain full stop are the only parts that both
sets use; a sentence frame is what a wording adds to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Templates:
    """Parts from which the wordings of facts are made.

    Attributes
    ----------
    attributes
        Phrases of one to four words for what is asked about an entity.
    nouns, adjectives, names
        Words from which entities are made.
    noun_phrases
        Ways to join an attribute and an entity.
    copulas
        What stands between a noun phrase and the value.
    openings, closings
        What precedes and follows a stated fact.
    questions
        Ways to ask for a noun phrase.
    verb_frames
        Pairs of a statement and its question that need no attribute.
    """

    attributes: tuple[str, ...]
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    names: tuple[str, ...]
    noun_phrases: tuple[str, ...]
    copulas: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    questions: tuple[str, ...]
    verb_frames: tuple[tuple[str, str], ...]

    def words(self) -> frozenset[str]:
        """Return the lower-case words of the attributes, nouns, adjectives and names."""
        return _words_of((*self.attributes, *self.nouns, *self.adjectives, *self.names))

    def frame_words(self) -> frozenset[str]:
        """Return the lower-case words of the noun phrases, copulas and verb frames."""
        verbs = (part for pair in self.verb_frames for part in pair)
        return _words_of((*self.noun_phrases, *self.copulas, *verbs))


def _words_of(phrases: Iterable[str]) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]{2,}", " ".join(phrases).lower()))


def phrases(text: str) -> tuple[str, ...]:
    """Split phrases at commas; a line end is a space."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


def frames(text: str) -> tuple[tuple[str, str], ...]:
    """Split a table of statements and questions, one pair a line."""
    pairs = (line.split(" | ") for line in text.strip().splitlines())
    return tuple((statement.strip(), question.strip()) for statement, question in pairs)


TRAINING = Templates(
    attributes=phrases(
        """
        capital, author, height, owner, serial label, closing hour, favourite colour, surname,
        email address, blood group, registered trademark, engine type, shoe width, zip extension,
        first chairman, exchange rate, boiling temperature, mother tongue, hidden talent, account
        balance, parking lot, tax identifier, middle initial, repair cost, exit strategy,
        delivery window, sister city, preferred drink, main spice of the soup, current version,
        release month, annual income, nickname, motto, supplier, heir, biggest rival, spouse,
        warranty period, file extension, network mask, server port, admin login, recovery phrase,
        table reservation
        """
    ),
    nouns=phrases(
        """
        river, mountain, company, doctor, engine, library, student, theatre, village, hospital,
        kitchen, newspaper, orchestra, farmer, tower, castle, bakery, satellite, university,
        museum, lawyer, factory, printer, camera, tenant, manager, kingdom, boat, teacher,
        island, temple, committee, warehouse, patient, customer, vineyard, machine, truck,
        guitar, desk, painter
        """
    ),
    adjectives=phrases(
        """
        old, big, northern, little, ancient, famous, broken, green, grey, tall, royal, private,
        eastern, heavy, brown, public, upper, former, orange, wooden, lonely, central, modern
        """
    ),
    names=phrases(
        """
        John, Mary, Peter, Susan, David, Linda, Robert, Karen, Michael, Laura, James, Emma,
        Daniel, Sarah, Thomas, Julia, Andrew, Helen, George, Anna, Paul, Clara, Mark, Nora,
        Simon, Eva, Martin, Rosa, Frank, Lucy, Carlos, Mei, Ahmed, Fatima, Yuki, Ivan, Olga,
        Priya, Kofi, Lars
        """
    ),
    noun_phrases=phrases(
        """
        the {a} of {e}, the {a} for {e}, {e}'s {a}, the {a} in {e}, the {a} from {e}, the {e}
        {a}, the {a} on {e}, the {a} given to {e}, the {a} with {e}, the {a} {e} has
        """
    ),
    copulas=phrases(
        """
        is, was, is:, :, =, is now, will be, remains, is set to, became, is called, is known to
        be, must be, should be, is still, is exactly, changed to, is given as, was changed to, is
        recorded as, is just, is simply, has always been, is currently, was found to be, is said
        to be, is believed to be, was named, may be, would be, is marked as, points to, refers
        to, amounts to, is determined by, goes by, is held at, has grown to, used to be, ended up
        as
        """
    ),
    openings=(
        "",
        "Remember: ",
        "Note that ",
        "By the way, ",
        "Remember that ",
        "Important: ",
        "For the record, ",
        "Please note: ",
        "Fact: ",
        "It is known that ",
        "As agreed, ",
        "Do not forget that ",
        "Today ",
        "In this story, ",
        "I was told that ",
        "Also, ",
        "NB: ",
        "- ",
        "* ",
    ),
    closings=(
        ".",
        "!",
        ", so keep it safe.",
        ", as far as anyone knows.",
        ", which nobody expected.",
        "; this will not change.",
        ", I think.",
        ", and that is all.",
    ),
    questions=(
        "What is {np}?",
        "What is {np}?",
        "What was {np}?",
        "Who is {np}?",
        "Where is {np}?",
        "When is {np}?",
        "{np}?",
        "Tell me {np}.",
        "Which is {np}?",
        "Do you know {np}?",
        "Give {np}.",
        "Please state {np}.",
        "What is the value of {np}?",
        "Find {np}.",
        "And {np}?",
        "What's {np}?",
        "How much is {np}?",
        "What is the name of {np}?",
        "Say what {np} is.",
        "what is {np}",
    ),
    verb_frames=frames(
        """
        {e} lives in {v} | Where does {e} live?
        {e} works at {v} | Where does {e} work?
        {e} was born in {v} | Where was {e} born?
        {e} likes {v} | What does {e} like?
        {e} plays {v} | What does {e} play?
        {e} wants {v} | What does {e} want?
        {e} bought {v} | What did {e} buy?
        {e} met {v} | Whom did {e} meet?
        {e} is parked at {v} | Where is {e} parked?
        {e} starts at {v} | When does {e} start?
        {e} costs {v} | How much does {e} cost?
        {e} weighs {v} | How much does {e} weigh?
        {e} belongs to {v} | Who does {e} belong to?
        {e} opens at {v} | When does {e} open?
        {e} was built in {v} | When was {e} built?
        {e} was written by {v} | Who wrote {e}?
        {e} is located in {v} | Where is {e} located?
        {e} is married to {v} | Who is {e} married to?
        {e} speaks {v} | Which language does {e} speak?
        {e} drives {v} | What does {e} drive?
        {e} studied {v} | What did {e} study?
        {e} was sold to {v} | To whom was {e} sold?
        {e} moved to {v} | Where did {e} move?
        {e} is allergic to {v} | What is {e} allergic to?
        {e} closed in {v} | When did {e} close?
        {e} is led by {v} | Who leads {e}?
        {e} uses {v} | What does {e} use?
        {e} called {v} | Who did {e} call?
        {e} hid the {w} in {v} | Where did {e} hide the {w}?
        {e} keeps the {w} at {v} | Where does {e} keep the {w}?
        {e} gave the {w} to {v} | Who did {e} give the {w} to?
        {e} sent the {w} to {v} | Where did {e} send the {w}?
        {e} has {v} | What does {e} have?
        {e} is made of {v} | What is {e} made of?
        {e} needs {v} | What does {e} need?
        """
    ),
)

HELD_OUT = Templates(
    attributes=phrases(
        """
        wifi password, locker code, captain, budget, departure gate, secret ingredient,
        birthplace, safe combination, passport number, seat assignment, launch date, room number,
        dog breed, licence plate, emergency contact, ringtone, tracking reference, project
        codename, wine list, dentist, ferry schedule, alarm pin, router model, eye color, bank
        branch, choir conductor, chess opening, landing pad, hotel booking, meeting point, dial
        tone, ticket price, gym coach, favorite movie, bus stop, pet tortoise, voicemail
        greeting, alibi, godmother, ransom, winning lottery digits, runway, insurance policy,
        patron saint, vault keyword, jersey size
        """
    ),
    nouns=phrases(
        """
        house, flight, cottage, submarine, inventor, harbour, lighthouse, choir, bicycle,
        sculptor, clinic, caravan, orchard, astronaut, gardener, violin, embassy, stadium,
        glacier, plumber, reindeer, pharmacy, elevator, balcony, detective, aquarium, dragon,
        bridge, tavern, tailor, volcano, nursery, cathedral, convoy, barber, tractor, chapel,
        envoy, locomotive, admiral
        """
    ),
    adjectives=phrases(
        """
        blue, crimson, haunted, third, silver, southern, abandoned, velvet, crooked, golden,
        sleepy, frozen, marble, purple, narrow, rusty, floating, retired, western, striped,
        foggy, humble
        """
    ),
    names=phrases(
        """
        Alice, Tobias, Ingrid, Osprey, Marigold, Bertrand, Chidi, Dolores, Ezekiel, Farrah,
        Gideon, Hilda, Ignatius, Jasmine, Konrad, Leopold, Miriam, Nadia, Octavia, Percival,
        Quentin, Rufus, Sabine, Theodora, Ulrich, Valentina, Winston, Ximena, Yolanda, Zachary
        """
    ),
    noun_phrases=phrases(
        """
        the {a} at {e}, the {a} belonging to {e}, the {a} assigned to {e}, the {a} behind {e},
        the {a} that {e} uses, the {a} kept by {e}, the {a} listed for {e}, the {a} chosen by
        {e}, the one {a} of {e}, {e}'s own {a}, {e}'s new {a}
        """
    ),
    copulas=phrases(
        """
        has been set to, turned out to be, happens to be, is listed as, stands at, equals, reads,
        is officially, was confirmed to be, shall be, is reported as, was fixed at, can only be,
        is written down as, is none other than, is understood to be, has been declared to be,
        ought to be, comes to, was announced as
        """
    ),
    openings=(
        "",
        "Keep in mind that ",
        "Just so you know, ",
        "According to the notes, ",
        "One more thing: ",
        "As it happens, ",
        "Everyone agrees that ",
        "For your information, ",
    ),
    closings=(
        ".",
        ", or so the log says.",
        ", effective immediately.",
        "; nothing else is known.",
        ", at least until Friday.",
    ),
    questions=(
        "Could you tell me {np}?",
        "I need to know {np}.",
        "What does the text say about {np}?",
        "Can you recall {np}?",
        "What would be {np}?",
        "Remind me: what is {np}?",
        "According to the text, what is {np}?",
        "Look up {np}.",
        "Which one is {np}?",
        "How would you describe {np}?",
    ),
    verb_frames=frames(
        """
        {e} boards at {v} | Where does {e} board?
        {e} departs from {v} | Where does {e} depart from?
        {e} was painted by {v} | Who painted {e}?
        {e} is stored in {v} | Where is {e} stored?
        {e} ships to {v} | Where does {e} ship to?
        {e} responds to {v} | What does {e} respond to?
        {e} was repaired by {v} | Who repaired {e}?
        {e} travels with {v} | Who does {e} travel with?
        {e} collects {v} | What does {e} collect?
        {e} sleeps in {v} | Where does {e} sleep?
        {e} was discovered by {v} | Who discovered {e}?
        {e} arrives at {v} | When does {e} arrive?
        {e} trusts {v} | Who does {e} trust?
        {e} is insured with {v} | Who is {e} insured with?
        {e} borrowed {v} | What did {e} borrow?
        {e} reports to {v} | Who does {e} report to?
        {e} was founded by {v} | Who founded {e}?
        {e} dreams of {v} | What does {e} dream of?
        {e} hired {v} | Who did {e} hire?
        {e} is guarded by {v} | Who guards {e}?
        {e} ordered {v} | What did {e} order?
        {e} smells of {v} | What does {e} smell of?
        {e} earns {v} | How much does {e} earn?
        {e} lost the {w} near {v} | Where did {e} lose the {w}?
        {e} lent the {w} to {v} | Who did {e} lend the {w} to?
        {e} buried the {w} under {v} | What did {e} bury the {w} under?
        """
    ),
)
