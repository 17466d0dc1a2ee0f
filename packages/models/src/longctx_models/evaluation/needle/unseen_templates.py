"""The unseen wordings of facts: a test set, where `HELD_OUT` may guide how training is mixed.

They share no part with the other sets save the empty opening and the plain full stop, and no
word of an attribute, noun, adjective or name.
"""

from __future__ import annotations

from .templates import Templates, frames, phrases

UNSEEN = Templates(
    attributes=phrases(
        """
        checkout deadline, understudy, waist measurement, curtain fabric, loyalty card, ancestor,
        callsign, roof material, cruising speed, map coordinates, padlock sequence, customs
        declaration, proofreader, caterer, lunch choice, polling station, subscription plan,
        backup generator, toothpaste brand, hometown, school hymn, deputy, docking bay,
        tournament ranking, mentor, watchword, discount voucher, expiry day, bonus payment,
        overdue fine, cloakroom tag, rainfall record, chief witness, translator, shuttle driver,
        bedroom wallpaper, cough remedy, interview slot, lens prescription, goalkeeper, tattoo
        motif, evacuation drill, job title, mortgage lender, honeymoon destination, overdraft
        limit
        """
    ),
    nouns=phrases(
        """
        beekeeper, canal, sheriff, accordion, fortress, surgeon, trawler, bungalow, penguin,
        casino, blacksmith, gallery, airship, valley, florist, prison, wardrobe, hermit, bookshop,
        carriage, squirrel, observatory, mayor, dam, juggler, laboratory, motorcycle, swamp,
        diplomat, mosque, harp, refinery, butcher, lagoon, tent, statue, cyclist, shipyard,
        puppet, boxer
        """
    ),
    adjectives=phrases(
        """
        red, ruined, fifth, bronze, inland, cheerful, flooded, ivory, turquoise, steep, mossy,
        gentle, brick, round, forgotten, swift, leather, stormy, enormous, black, unfinished,
        polite
        """
    ),
    names=phrases(
        """
        Agnes, Barnaby, Cordelia, Desmond, Elodie, Fergus, Gwendolyn, Hamish, Isadora, Jerome,
        Katarina, Lucinda, Mortimer, Nikolai, Orson, Petra, Raphael, Salome, Thaddeus, Ursula,
        Viktor, Wanda, Xiomara, Yusuf, Zoltan, Anneliese, Bogdan, Chiara, Dashiell, Efua
        """
    ),
    noun_phrases=phrases(
        """
        the {a} near {e}, the {a} registered to {e}, the {a} that goes with {e}, the {a} held by
        {e}, the {a} picked for {e}, the {a} set aside for {e}, the {a} that {e} prefers, the {a}
        connected with {e}, the only {a} of {e}, {e}'s personal {a}, {e}'s original {a}
        """
    ),
    copulas=phrases(
        """
        is shown as, has to be, is registered as, was settled as, is supposed to be, is
        certainly, was decided to be, is nowadays, is described as, consists of, is identified
        as, was put down as, is expected to be, might well be, has been chosen as, is indeed, is
        as follows:, was verified as, sits at, cannot be anything but
        """
    ),
    openings=(
        "",
        "You should know that ",
        "To be clear, ",
        "The records show that ",
        "On a side note, ",
        "As you may have heard, ",
        "It turns out that ",
        "Before I forget: ",
    ),
    closings=(
        ".",
        ", as the register shows.",
        ", at the time of writing.",
        "; there is no doubt about it.",
        ", in case it matters.",
    ),
    questions=(
        "Can you tell me what {np} is?",
        "I would like to know {np}.",
        "What did they say about {np}?",
        "Does it say what {np} is?",
        "Name {np}.",
        "Let me know {np}.",
        "Based on the document, what is {np}?",
        "What should I put down as {np}?",
        "Could I have {np}, please?",
        "Who or what is {np}?",
    ),
    verb_frames=frames(
        """
        {e} stopped at {v} | Where did {e} stop?
        {e} respects {v} | Who does {e} respect?
        {e} was invented by {v} | Who invented {e}?
        {e} is displayed in {v} | Where is {e} displayed?
        {e} cooks {v} | What does {e} cook?
        {e} was arrested by {v} | Who arrested {e}?
        {e} emigrated to {v} | Where did {e} emigrate to?
        {e} produces {v} | What does {e} produce?
        {e} avoids {v} | What does {e} avoid?
        {e} is descended from {v} | Who is {e} descended from?
        {e} overlooks {v} | What does {e} overlook?
        {e} received {v} | What did {e} receive?
        {e} dropped {v} | What did {e} drop?
        {e} was photographed by {v} | Who photographed {e}?
        {e} vanished in {v} | When did {e} vanish?
        {e} argued with {v} | Who did {e} argue with?
        {e} is powered by {v} | What powers {e}?
        {e} apologised for {v} | What did {e} apologise for?
        {e} finishes at {v} | When does {e} finish?
        {e} was adopted by {v} | Who adopted {e}?
        {e} is engaged to {v} | Who is {e} engaged to?
        {e} wears {v} | What does {e} wear?
        {e} charges {v} | How much does {e} charge?
        {e} hung the {w} above {v} | What did {e} hang the {w} above?
        {e} showed the {w} to {v} | Who did {e} show the {w} to?
        {e} locked the {w} inside {v} | Where did {e} lock the {w}?
        """
    ),
)
