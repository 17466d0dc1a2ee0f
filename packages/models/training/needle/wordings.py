"""English wordings for training facts, by the thousand.

The template sets of `longctx_models.evaluation.needle` hold some dozens of wordings, which a model
learns by heart. Here English phrases are put together from lists, so that none is seen often.
What a test set holds is left out when this module is imported.
"""

from __future__ import annotations

import random

from longctx_models.evaluation.needle.templates import HELD_OUT, TRAINING
from longctx_models.evaluation.needle.unseen_templates import UNSEEN

_TEST_SETS = (HELD_OUT, UNSEEN)


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


def _verbs(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.split()) for row in text.split(";"))


_BE = _phrases(
    """
    is, is, is, is, was, was, will be, has been, had been, remains, became, has become, becomes,
    may be, might be, must be, should be, would be, could be, can be, is being, stays
    """
)
_SEEMING = _phrases(
    """
    seems to be, appears to be, proves to be, proved to be, tends to be, claims to be, needs to
    be, has to be, had to be, is going to be, is about to be, is likely to be, is supposed to be,
    is meant to be, is sure to be, is bound to be, is yet to be, is certain to be, was going to
    be, was meant to be, looks to be, is thought to be, is held to be, is assumed to be, is
    rumoured to be, is claimed to be, was said to be, was shown to be, was judged to be, has
    proved to be
    """
)
_ADVERBIALS = _phrases(
    """
    in fact, in truth, in reality, of course, for now, for good, at present, at the moment, to
    this day, once again, once more, as ever, after all, as before, in the end, in general, in
    theory, in practice, at last, at best, at least, at most, by now, by law, by default, by
    chance, by all accounts, without doubt, no doubt, nothing but, nothing more than, nothing less
    than, no other than, no longer secret:, not only, all but, little more than, more or less,
    very nearly, almost exactly, precisely, exactly, roughly, merely, purely, strictly, really,
    truly, plainly, apparently, reportedly, allegedly, presumably, evidently, finally, initially,
    formerly, nominally, technically, essentially, basically, invariably, permanently,
    temporarily, of late, these days, this year, this time, since then, from now on, until further
    notice, as of today, as a rule, for the most part, on record as, on file as, down as, now
    known as, better known as, otherwise known as, the same as, equal to, close to, set at,
    identical to, limited to, reduced to, next to, one of a kind:, also, even, again, already,
    indeed
    """
)
_PARTICIPLES = _phrases(
    """
    known, recorded, described, registered, printed, quoted, published, identified, estimated,
    calculated, chosen, found, shown, measured, agreed, noted, counted, spelled, pronounced,
    translated, abbreviated, encoded, stored, filed, kept, put, placed, entered, typed, engraved,
    stamped, carved, marked, labelled, tagged, titled, named, called, dubbed, branded, classed,
    ranked, rated, valued, priced, sold, advertised, billed, booked, reserved, scheduled,
    postponed, moved, changed, altered, updated, corrected, converted, raised, lowered, reduced,
    increased, limited, capped, fixed, frozen, locked, tied, linked, mapped, matched, paired,
    defined, given, stated, cited, mentioned, remembered, regarded, seen, taken, accepted,
    treated, considered, deemed, ruled, declared, certified, verified, proven, documented,
    catalogued, indexed, written, signed, sealed, told, sworn, believed, expected, planned,
    intended, required, ordered
    """
)
_LINKS = ("as", "as", "as", "to be", "to be", "at", "at", "to", "in", "by", "with", "under", "on")
_VERBS_BEFORE_VALUE = _phrases(
    """
    totals, means, says, shows, matches, names, denotes, spells, yields, contains, includes,
    represents, indicates, specifies, states, mentions, lists, gives, has, carries, bears, holds,
    takes, uses, begins with, starts with, ends with, ends in, leads to, adds up to, works out to,
    works out as, boils down to, turns into, turned into, changed into, changes to, switched to,
    moved to, rose to, fell to, grew to, shrank to, dropped to, went to, goes to, goes back to,
    goes under, passes for, passed to, settled on, settled at, came out as, came out at, came in
    at, comes out to, counts as, serves as, acts as, functions as, doubles as, translates to,
    translates as, converts to, corresponds to, relates to, belongs to, is down to, stays at,
    stays with, sits at, hovers around, revolves around, hinges on, rests on, rests with, lies in,
    lies at, lies with, depends on, consists of, stands for, stems from, follows from, results in,
    resulted in, ran to, runs to, averages, approaches, reaches, reached, hit, exceeds, equates
    to, reverted to, defaults to, resolves to, evaluates to, expanded to, was, were, be, ->, =>,
    ==, -,
    """
)
_VERBS_BEFORE_VALUE = tuple(verb for verb in _VERBS_BEFORE_VALUE if verb)

_ADJECTIVES = _phrases(
    """
    current, old, former, only, first, second, last, next, latest, final, favourite, main, best,
    second-best, official, unofficial, secret, real, true, original, proper, correct, exact, full,
    temporary, permanent, preferred, private, public, personal, regular, standard, special
    """
)
_RELATIONS = _phrases(
    """
    of, for, in, at, from, on, with, by, near, under, inside, held by, owned by, made by, found
    in, found at, found on, known to, known by, given by, taken by, taken from, set by, set for,
    kept in, kept at, kept for, left by, left at, left for, left with, chosen for, meant for,
    intended for, required by, required for, needed by, needed for, attached to, connected to,
    connected with, related to, pertaining to, registered to, registered for, registered under,
    recorded for, recorded at, written by, written for, named by, named for, shown to, shown by,
    shown on, sent by, sent to, granted to, handed to, promised to, awarded to, owed to, specific
    to, unique to, typical of, preferred by, favoured by, selected by, selected for, picked by,
    agreed with, shared by, issued to, issued by, provided by, provided for, supplied to, stored
    by
    """
)
_RELATIVE_VERBS = _phrases(
    """
    has, had, got, owns, needs, wants, likes, knows, keeps, holds, carries, gives, takes, shows,
    follows, prefers, requires, received, chose, picked, mentioned, named, set, made, found, lost,
    wrote, asked for, depends on, works with, lives with, deals with, insists on, cares about
    """
)
_MADE_NOUN_PHRASES = (
    *(f"the {{a}} {relation} {{e}}" for relation in _RELATIONS),
    *(f"the {adjective} {{a}} of {{e}}" for adjective in _ADJECTIVES),
    *(f"{{e}}'s {adjective} {{a}}" for adjective in _ADJECTIVES),
    *(f"the {{a}} {{e}} {verb}" for verb in _RELATIVE_VERBS),
    *(f"the {{a}} that {{e}} {verb}" for verb in _RELATIVE_VERBS),
    *(f"the {{a}} which {{e}} {verb}" for verb in _RELATIVE_VERBS),
)

_ASKING = _phrases(
    """
    What is, What was, What will be, What might be, What could be, What exactly is, So what is,
    And what is, Now what is, Then what is, What again is, What then is, Which is, Which was, Who
    is, Who was, Where is, Where was, When is, When was, How big is, How high is, How long is, How
    old is, Tell me, Tell us, Please tell me, Just tell me, Give me, Give us, Please give, Please
    provide, Please name, Name, State, Report, Repeat, Recall, Quote, Print, Show, Show me,
    Display, Output, Return, Retrieve, Extract, Write, Write down, Type, Spell out, List, Look
    for, Search for, Find out, Find me, Check, Check for, Determine, Identify, Specify, Confirm,
    Mention, Point out, Answer with, Reply with, Respond with, I want, I need, I am looking for, I
    am after, I seek, I forgot, I have lost, I lost, I cannot find, I cannot recall, I wonder
    about, I must know, I would like to know, I would like, I want to know, We want to know, We
    are asked for, They asked for, My question is about, My question:, Question:, The question
    is:, It is about, Have you got, Have you seen, Have you found, Do you have, Do you recall, Do
    we know, Does anyone know, Does it say, Did it say, Did you see, Did you read, Did you note,
    Did they mention, Can you find, Can you name, Can you give me, Can you tell, Can anyone tell
    me, Could I have, Could you find, Could you repeat, Could you name, May I know, May I ask for,
    Might you know, Would you know, Would you please state, Will you tell me, Is there a record
    of, Is it possible to learn, Let me know, Let us have, Help me find, Help me with, Remind us
    of, Please remind me of, Please recall, Please repeat, Please look up, Please find, What can
    you say about, What can be said of, What is said about, What is written about, What is known
    about, What is given as, What is stated as, What did they call, What did you read about, What
    do they say about, What do you know of, What do we call, What does it say about, What does the
    document give as, What does the author say about, What about, How about, Regarding, About, As
    to, Concerning, In your words:, In one phrase:, In short:, From the text:, From the document:,
    From memory:, By the text:, Based on the text:, Based on the above:, Going by the above:,
    After reading this:, Having read this:, According to the above:, According to this:
    """
)
_EMBEDDED = (
    "What {np} is",
    "What {np} was",
    "Say what {np} may be",
    "Tell me what {np} is",
    "Tell us what {np} was",
    "Do you know what {np} is",
    "Do you know who {np} is",
    "Can you say what {np} is",
    "Can you see what {np} is",
    "Could you say where {np} is",
    "I wonder what {np} is",
    "I would ask what {np} is",
    "I want to know what {np} is",
    "I have no clue what {np} is",
    "I do not know what {np} is",
    "Is it said what {np} is",
    "Is it clear what {np} is",
    "Did anyone write what {np} is",
    "Does the text tell what {np} is",
    "Find out what {np} is",
    "Look where {np} is named",
    "Repeat what was said of {np}",
    "Which value does {np} have",
    "What value has {np}",
    "What name does {np} have",
    "What do you get for {np}",
    "What stands there for {np}",
    "What should I write for {np}",
    "What should I enter as {np}",
    "What would you answer for {np}",
)
_AFTER_QUESTION = (
    *(", please", ", if you can", ", if you know it", ", would you", ", do you know", ", again"),
    *("; what is it", "; what was it", "; which one is it", "; can you help", "; do you know it"),
    *(": what is it", ": what was it", ": can you say", ": do you know", " - what is it", " then"),
    *(" again", " now", " here", " once more", " right now", " at all", " exactly", " today"),
    *(" in the text", " in this text", " in the document", " in the story", " in the above"),
    *(" according to the text", " according to this", " as given above", " as stated", " above"),
    *(
        ", as stated above",
        ", in short",
        ", in full",
        ", briefly",
        ", and nothing else",
        " by name",
    ),
    *(
        " as mentioned",
        " as written",
        " as far as we know",
        " for me",
        " from the text",
        " or not",
    ),
    *(
        "; it has slipped my mind",
        "; I cannot think of it",
        ", since I need it",
        " so I can note it",
    ),
)
_OPENINGS = (
    *("In short, ", "In brief, ", "In other words, ", "In any case, ", "In passing, ", "Indeed, "),
    *("To be clear, ", "To be precise, ", "To be sure, ", "To begin with, ", "To repeat, "),
    *("Let it be known that ", "Let me add that ", "Let me say that ", "Never forget that "),
    *("It turns out that ", "It is said that ", "It is true that ", "It is clear that "),
    *("It seems that ", "It was decided that ", "It was agreed that ", "It should be said that "),
    *("As you know, ", "As I said, ", "As we all know, ", "As usual, ", "As a reminder, "),
    *("We know that ", "We found that ", "We learned that ", "We should note that ", "They say "),
    *("I heard that ", "I hear ", "I know that ", "I think that ", "I should mention that "),
    *(
        "People say that ",
        "Somebody said that ",
        "She said that ",
        "He wrote that ",
        "She wrote: ",
    ),
    *("Reminder: ", "Notice: ", "Update: ", "Correction: ", "Hint: ", "Record: ", "Entry: "),
    *("First, ", "Second, ", "Finally, ", "Meanwhile, ", "Besides, ", "Moreover, ", "However, "),
    *("Officially, ", "Apparently, ", "Reportedly, ", "Curiously, ", "Oddly, ", "Of course, "),
    *(
        "Yesterday ",
        "This year ",
        "At present, ",
        "Since last week ",
        "From today on ",
        "So far, ",
    ),
    *("1. ", "2) ", "(a) ", "> ", "# ", "-- ", "+ ", "... ", "And ", "But ", "Because ", "Well, "),
)
_CLOSINGS = (
    *("...", ";", " (sic).", " (see below).", " (as agreed).", ", of course.", ", it seems."),
    *(", they say.", ", we hear.", ", I believe.", ", as you know.", ", as usual.", ", for now."),
    *(", by the way.", ", in case you ask.", ", if you must know.", ", as everyone knows."),
    *(", according to her.", ", according to the register.", ", as the record shows."),
    *(", until someone changes it.", ", and it will stay so.", ", and that is final."),
    *(
        ", and nobody minds.",
        ", but do not tell anyone.",
        ", but that may change.",
        ", yet again.",
    ),
    *("; remember it.", "; write it down.", "; there is no doubt.", "; it was checked twice."),
    *("; ask anyone.", "; the rest is unknown.", "; so much for that.", " - or so they say."),
    *(" - no more, no less.", " - believe it or not.", ". Truly.", ". That is all.", "?", "!!"),
    *(
        ", which surprised no one.",
        ", which is odd.",
        ", which is why we note it.",
        ", since May.",
    ),
)

# base, third person, past, past participle
_VERBS = _verbs(
    """
    accept accepts accepted accepted; admire admires admired admired; adopt adopts adopted
    adopted; ask asks asked asked; attack attacks attacked attacked; avoid avoids avoided avoided;
    bake bakes baked baked; beat beats beat beaten; begin begins began begun; believe believes
    believed believed; blame blames blamed blamed; bless blesses blessed blessed; break breaks
    broke broken; bring brings brought brought; burn burns burned burned; catch catches caught
    caught; change changes changed changed; chase chases chased chased; check checks checked
    checked; choose chooses chose chosen; clean cleans cleaned cleaned; consult consults consulted
    consulted; cook cooks cooked cooked; copy copies copied copied; cover covers covered covered;
    cross crosses crossed crossed; cut cuts cut cut; defend defends defended defended; deliver
    delivers delivered delivered; describe describes described described; design designs designed
    designed; destroy destroys destroyed destroyed; detest detests detested detested; draw draws
    drew drawn; drink drinks drank drunk; eat eats ate eaten; employ employs employed employed;
    enjoy enjoys enjoyed enjoyed; envy envies envied envied; export exports exported exported;
    fear fears feared feared; feed feeds fed fed; fight fights fought fought; finish finishes
    finished finished; fix fixes fixed fixed; follow follows followed followed; forget forgets
    forgot forgotten; forgive forgives forgave forgiven; greet greets greeted greeted; grow grows
    grew grown; hate hates hated hated; hear hears heard heard; help helps helped helped; hold
    holds held held; ignore ignores ignored ignored; import imports imported imported; install
    installs installed installed; interview interviews interviewed interviewed; invent invents
    invented invented; invite invites invited invited; join joins joined joined; judge judges
    judged judged; kick kicks kicked kicked; know knows knew known; lead leads led led; learn
    learns learned learned; leave leaves left left; lift lifts lifted lifted; love loves loved
    loved; make makes made made; manage manages managed managed; mention mentions mentioned
    mentioned; miss misses missed missed; mix mixes mixed mixed; name names named named; notice
    notices noticed noticed; observe observes observed observed; offer offers offered offered;
    open opens opened opened; paint paints painted painted; phone phones phoned phoned; photograph
    photographs photographed photographed; pick picks picked picked; praise praises praised
    praised; prefer prefers preferred preferred; print prints printed printed; produce produces
    produced produced; protect protects protected protected; publish publishes published
    published; pull pulls pulled pulled; push pushes pushed pushed; read reads read read; receive
    receives received received; reject rejects rejected rejected; rent rents rented rented;
    replace replaces replaced replaced; rescue rescues rescued rescued; respect respects respected
    respected; ride rides rode ridden; ring rings rang rung; save saves saved saved; see sees saw
    seen; seek seeks sought sought; select selects selected selected; serve serves served served;
    share shares shared shared; shake shakes shook shaken; show shows showed shown; sing sings
    sang sung; spend spends spent spent; start starts started started; support supports supported
    supported; swallow swallows swallowed swallowed; take takes took taken; tell tells told told;
    test tests tested tested; thank thanks thanked thanked; throw throws threw thrown; touch
    touches touched touched; train trains trained trained; treat treats treated treated; try tries
    tried tried; understand understands understood understood; visit visits visited visited; wash
    washes washed washed; watch watches watched watched; wear wears wore worn; wish wishes wished
    wished
    """
)
_VERBS_WITH_PREPOSITION = _verbs(
    """
    live lives lived at; stay stays stayed in; sit sits sat on; stand stands stood near; walk
    walks walked to; run runs ran to; fly flies flew to; drive drives drove to; sail sails sailed
    for; head heads headed for; look looks looked at; look looks looked for; listen listens
    listened to; talk talks talked about; talk talks talked to; speak speaks spoke with; write
    writes wrote to; work works worked for; work works worked with; play plays played with; play
    plays played for; fight fights fought with; argue argues argued with; agree agrees agreed
    with; deal deals dealt with; depend depends depended on; rely relies relied on; insist insists
    insisted on; think thinks thought of; worry worries worried about; care cares cared about;
    laugh laughs laughed at; wait waits waited for; hope hopes hoped for; pay pays paid for; apply
    applies applied for; ask asks asked for; pray prays prayed for; belong belongs belonged to;
    return returns returned to; come comes came from; escape escapes escaped from; suffer suffers
    suffered from; recover recovers recovered from; hide hides hid behind; stop stops stopped at;
    land lands landed on; climb climbs climbed onto; fall falls fell into; crash crashes crashed
    into; believe believes believed in; specialise specialises specialised in; invest invests
    invested in; vote votes voted for; study studies studied with; dance dances danced with; dine
    dines dined with; sing sings sang about; know knows knew about; hear hears heard from; differ
    differs differed from
    """
)
_EVERY_PLACED = _phrases(
    """
    kept, placed, parked, hung, built, found, seen, held, sold, bought, made, taught, trained,
    raised, hosted, printed, registered, docked, moored, displayed, mounted, installed, locked
    """
)
_PLACES = ("in", "at", "near", "by", "under", "behind", "on", "with", "beside", "above", "inside")
_WH = ("What", "What", "What", "Who", "Where", "Which one")


def _test_frame_words() -> frozenset[str]:
    """Return the words that only the verb frames of a test set have."""
    words: set[str] = set()
    for templates in _TEST_SETS:
        for pair in templates.verb_frames:
            words.update(" ".join(pair).lower().rstrip("?").split())
    common = " ".join(" ".join(pair) for pair in TRAINING.verb_frames).lower().replace("?", "")
    return frozenset(words - set(common.split()))


_FORBIDDEN = _test_frame_words()
VERBS = tuple(verb for verb in _VERBS if not _FORBIDDEN.intersection(verb))
VERBS_WITH_PREPOSITION = tuple(
    verb for verb in _VERBS_WITH_PREPOSITION if not _FORBIDDEN.intersection(verb[:3])
)
PLACED = tuple(word for word in _EVERY_PLACED if word not in _FORBIDDEN)
NOUN_PHRASES = tuple(
    pattern
    for pattern in _MADE_NOUN_PHRASES
    if not any(pattern in templates.noun_phrases for templates in _TEST_SETS)
)
OPENINGS = tuple(o for o in _OPENINGS if not any(o in t.openings for t in _TEST_SETS))
CLOSINGS = tuple(c for c in _CLOSINGS if not any(c in t.closings for t in _TEST_SETS))
_TEST_COPULAS = frozenset(copula for templates in _TEST_SETS for copula in templates.copulas)
_TEST_QUESTIONS = frozenset(q for templates in _TEST_SETS for q in templates.questions)


def copula(rng: random.Random) -> str:
    """Return English words between a noun phrase and a value; none that a test set has."""
    kind = rng.random()
    if kind < 0.4:
        made = f"{rng.choice(_BE)} {rng.choice(_ADVERBIALS)}"
    elif kind < 0.5:
        made = rng.choice(_SEEMING)
        if rng.random() < 0.2:
            made = f"{rng.choice(_ADVERBIALS).rstrip(':')} {made}"
    elif kind < 0.75:
        made = f"{rng.choice(_BE)} {rng.choice(_PARTICIPLES)} {rng.choice(_LINKS)}"
    else:
        made = rng.choice(_VERBS_BEFORE_VALUE)
    return copula(rng) if made in _TEST_COPULAS else made


def question(rng: random.Random) -> str:
    """Return a question about ``{np}``; none that a test set has."""
    asked = rng.choice(_EMBEDDED) if rng.random() < 0.25 else f"{rng.choice(_ASKING)} {{np}}"
    after = rng.choice(_AFTER_QUESTION) if rng.random() < 0.4 else ""
    made = f"{asked}{after}{rng.choice('???..')}"
    return question(rng) if made in _TEST_QUESTIONS else made


def verb_frame(rng: random.Random) -> tuple[str, str]:
    """Return a statement and its question about a verb, with slots ``{e}``, ``{v}``, ``{w}``."""
    kind, wh = rng.random(), rng.choice(_WH)
    place = rng.choice(_PLACES)
    if kind < 0.45:
        base, third, past, participle = rng.choice(VERBS)
        return rng.choice(
            (
                (f"{{e}} {third} {{v}}", f"{wh} does {{e}} {base}?"),
                (f"{{e}} {past} {{v}}", f"{wh} did {{e}} {base}?"),
                (f"{{e}} {past} {{v}}", f"{wh} did {{e}} {base}?"),
                (f"{{e}} has {participle} {{v}}", f"{wh} has {{e}} {participle}?"),
                (f"{{e}} will {base} {{v}}", f"{wh} will {{e}} {base}?"),
                (f"{{e}} was {participle} by {{v}}", f"Who {past} {{e}}?"),
                (f"{{e}} was {participle} by {{v}}", f"By whom was {{e}} {participle}?"),
                (f"{{e}} is {participle} by {{v}}", f"Who {third} {{e}}?"),
            )
        )
    if kind < 0.7:
        base, third, past, preposition = rng.choice(VERBS_WITH_PREPOSITION)
        tail = f" {preposition}"
        asked_tail = tail if rng.random() < 0.7 else ""
        return rng.choice(
            (
                (f"{{e}} {third}{tail} {{v}}", f"{wh} does {{e}} {base}{asked_tail}?"),
                (f"{{e}} {past}{tail} {{v}}", f"{wh} did {{e}} {base}{asked_tail}?"),
                (f"{{e}} will {base}{tail} {{v}}", f"{wh} will {{e}} {base}{asked_tail}?"),
                (
                    f"{{e}} {third}{tail} {{v}}",
                    f"{preposition.capitalize()} what does {{e}} {base}?",
                ),
            )
        )
    if kind < 0.85:
        placed = rng.choice(PLACED)
        be = rng.choice(("is", "was"))
        asked = rng.choice((f" {place}", ""))
        return f"{{e}} {be} {placed} {place} {{v}}", f"{wh} {be} {{e}} {placed}{asked}?"
    base, third, past, _ = rng.choice(VERBS)
    asked = rng.choice((f" {place}", ""))
    return rng.choice(
        (
            (f"{{e}} {past} the {{w}} {place} {{v}}", f"{wh} did {{e}} {base} the {{w}}{asked}?"),
            (
                f"{{e}} {third} the {{w}} {place} {{v}}",
                f"{wh} does {{e}} {base} the {{w}}{asked}?",
            ),
        )
    )
