"""The retired wordings of facts: they once were a test set and may be trained on."""

from __future__ import annotations

from .templates import Templates, frames, phrases

RETIRED = Templates(
    attributes=phrases(
        """
        thermostat setting, mascot, radio frequency, parcel weight, curfew, landlord, food
        allergy, fuel grade, mailbox key, ski instructor, visa category, piano tuner, wedding
        anniversary, screen resolution, campsite, broadcast channel, star sign, monthly rent,
        flag design, shift supervisor, courtroom, hair dye, elevation, train platform, invoice
        total, theme song, nearest airport, burial site, postal district, battery capacity, paint
        shade, shelf position, bedtime, stage alias, scout leader, lucky charm, unlock gesture,
        dessert, membership tier, census tally, midwife, quarantine length, sworn enemy, test
        score, bail amount, voting precinct
        """
    ),
    nouns=phrases(
        """
        windmill, carpenter, monastery, canoe, greenhouse, magician, ranger, helicopter, cellar,
        fountain, widow, barracks, journalist, telescope, courier, sawmill, kiosk, pirate,
        brewery, parrot, hostel, sailor, trumpet, cinema, reservoir, goat, archive, chemist,
        lantern, mansion, regiment, seamstress, igloo, drone, tram, waiter, pavilion, falcon,
        meadow, wizard
        """
    ),
    adjectives=phrases(
        """
        yellow, quiet, second, copper, hollow, dusty, scarlet, noisy, sunken, tiny, spotted,
        gloomy, proud, coastal, jade, weary, leaning, vacant, glass, windy, pale, secluded
        """
    ),
    names=phrases(
        """
        Beatrice, Caspian, Declan, Esmeralda, Florian, Greta, Horatio, Imogen, Juniper, Keziah,
        Lorenzo, Magnus, Noor, Ophelia, Pascal, Quincy, Rosalind, Sven, Tamsin, Umberto, Violet,
        Wilhelmina, Xavier, Yasmin, Zelda, Amadou, Bronwyn, Cosima, Dmitri, Eleanor
        """
    ),
    noun_phrases=phrases(
        """
        the {a} linked to {e}, the {a} associated with {e}, the {a} that belongs to {e}, the {a}
        reserved for {e}, the {a} used by {e}, the {a} allotted to {e}, the {a} tied to {e}, the
        {a} {e} relies on, the {a} concerning {e}, {e}'s usual {a}, {e}'s actual {a}
        """
    ),
    copulas=phrases(
        """
        has now become, is presently, appears as, works out at, is stated as, proved to be, is
        entered as, has been logged as, is down as, is nothing but, seems to be, was revealed to
        be, is taken to be, was agreed to be, corresponds to, is bound to be, is reckoned to be,
        has stayed at, is in fact, is quoted as
        """
    ),
    openings=(
        "",
        "Bear in mind that ",
        "It is worth knowing that ",
        "As stated earlier, ",
        "A small detail: ",
        "Incidentally, ",
        "Nobody disputes that ",
        "From what we gathered, ",
    ),
    closings=(
        ".",
        ", according to the files.",
        "; that much is certain.",
        ", as of this morning.",
        ", unless someone objects.",
    ),
    questions=(
        "Would you mind telling me {np}?",
        "I have forgotten {np}; what is it?",
        "What is mentioned as {np}?",
        "Do you remember {np}?",
        "What do we know about {np}?",
        "From the passage above, what is {np}?",
        "Quickly, what is {np}?",
        "Identify {np}.",
        "Any idea what {np} is?",
        "What exactly is {np}?",
    ),
    verb_frames=frames(
        """
        {e} landed at {v} | Where did {e} land?
        {e} admires {v} | Who does {e} admire?
        {e} was designed by {v} | Who designed {e}?
        {e} is waiting in {v} | Where is {e} waiting?
        {e} eats {v} | What does {e} eat?
        {e} was rescued by {v} | Who rescued {e}?
        {e} grew up in {v} | Where did {e} grow up?
        {e} teaches {v} | What does {e} teach?
        {e} fears {v} | What does {e} fear?
        {e} is named after {v} | Who is {e} named after?
        {e} connects to {v} | What does {e} connect to?
        {e} inherited {v} | What did {e} inherit?
        {e} won {v} | What did {e} win?
        {e} was inspected by {v} | Who inspected {e}?
        {e} resigned in {v} | When did {e} resign?
        {e} competes with {v} | Who does {e} compete with?
        {e} runs on {v} | What does {e} run on?
        {e} is covered with {v} | What is {e} covered with?
        {e} complained about {v} | What did {e} complain about?
        {e} visited {v} | What did {e} visit?
        {e} was donated by {v} | Who donated {e}?
        {e} is staying with {v} | Who is {e} staying with?
        {e} carries {v} | What does {e} carry?
        {e} stole the {w} from {v} | Who did {e} steal the {w} from?
        {e} left the {w} beside {v} | What did {e} leave the {w} beside?
        {e} traded the {w} for {v} | What did {e} trade the {w} for?
        """
    ),
)
