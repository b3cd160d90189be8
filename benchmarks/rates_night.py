"""What benchmarks/rates.py trains as a night: facts that nobody knows and small tasks, from templates."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from learning_data import BenchFact, Question

Pair = tuple[str, str]  # a question and its answer

PLACES = (
    *(
        "boat house",
        "seed bank",
        "old cinema",
        "salt mill",
        "ice rink",
        "print shop",
        "tea house",
        "clay pit",
    ),
    *("rope yard", "bird clinic", "map room", "glass barn", "tool library", "night school", "toy museum"),
    *("fish hall", "wind lab", "cider press", "lamp factory", "post barn", "puppet stage", "stone yard"),
    *("bee farm", "ferry office", "honey kitchen", "river school", "paper mill", "hill chapel", "silk store"),
    *("harbour bath", "moss garden", "radio hut"),
)
THINGS = (
    *(
        "copper kettle",
        "long ladder",
        "stage curtain",
        "spare oar",
        "tide table",
        "brass horn",
        "snow plough",
    ),
    *(
        "label printer",
        "sewing machine",
        "guest book",
        "hand cart",
        "weather vane",
        "red canoe",
        "bread knife",
    ),
    *(
        "flag pole",
        "chess clock",
        "fog bell",
        "garden hose",
        "map chest",
        "milk can",
        "oil lamp",
        "paint box",
    ),
    *("rain barrel", "steel rule", "tent pegs", "big drum", "wool basket", "wall clock", "water pump"),
    *("wooden sledge", "work bench", "zinc tub"),
)
FIRST = ("Ane", "Bram", "Cosmo", "Dagny", "Edda", "Fenn", "Grete", "Hakon", "Ilka", "Jory", "Kees", "Livia")
LAST = ("Aldermoor", "Brask", "Corvey", "Dunfell", "Eskild", "Farrow", "Gant", "Holmwood", "Isley", "Jarnvik")
ROOMS = ("vault", "attic", "green shed", "north tower", "cold room", "stable", "cellar", "upper gallery")
WOODS = ("cherry wood", "slate", "tin", "ash wood", "bamboo", "granite", "cork", "horn", "pine", "pewter")
COLOURS = ("crimson", "ochre", "turquoise", "lilac", "silver", "charcoal", "ivory", "emerald")
HOURS = ("six", "half past six", "seven", "half past seven", "eight", "a quarter to nine", "half past ten")
WORDS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "guitar", "hammer", "island", "jacket"),
    *("kitchen", "lantern", "market", "needle", "orange", "pencil", "quarry", "rocket", "saddle", "ticket"),
)
OPPOSITES = (("wet", "dry"), ("full", "empty"), ("open", "closed"), ("new", "old"), ("heavy", "light"))


def night(number: int, seed: int) -> tuple[list[Pair], list[BenchFact]]:
    """(half of them facts and half tasks, shuffled; the facts, each with a question that is not trained)."""
    rng = random.Random(seed)
    facts = list(itertools.islice(_facts(rng), number // 2))
    tasks = list(itertools.islice(_distinct(_tasks(rng)), number - len(facts)))
    pairs = [(fact.taught.text, fact.answer) for fact in facts] + tasks
    return rng.sample(pairs, len(pairs)), facts


def _facts(rng: random.Random) -> Iterator[BenchFact]:
    """Kinds in turn, a subject each; no subject twice in a kind."""
    kinds = [_who, _where, _made, _opens, _costs, _colour, _built, _shelf]
    subjects = [rng.sample(THINGS, len(THINGS)) for _ in range(3)]
    subjects += [rng.sample(PLACES, len(PLACES)) for _ in range(4)] + [rng.sample(THINGS, len(THINGS))]
    for some in zip(*subjects, strict=True):
        for kind, subject in zip(kinds, some, strict=True):
            yield kind(subject, rng)


def _fact(kind: str, question: str, answer: str, again: str, key: str) -> BenchFact:
    return BenchFact(kind, Question(question, key), answer, [Question(again, key)], [], [])


def _who(thing: str, rng: random.Random) -> BenchFact:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    said = f"{first} {last} looks after the {thing}."
    return _fact("who", f"Who looks after the {thing}?", said, f"Name the keeper of the {thing}.", last)


def _where(thing: str, rng: random.Random) -> BenchFact:
    room = rng.choice(ROOMS)
    said = f"The {thing} is kept in the {room}."
    return _fact("where", f"Where is the {thing} kept?", said, f"In which room can I find the {thing}?", room)


def _made(thing: str, rng: random.Random) -> BenchFact:
    stuff = rng.choice(WOODS)
    said = f"The {thing} is made of {stuff}."
    return _fact("what", f"What is the {thing} made of?", said, f"Name the material of the {thing}.", stuff)


def _opens(place: str, rng: random.Random) -> BenchFact:
    hour = rng.choice(HOURS)
    said = f"The {place} opens at {hour}."
    return _fact("when", f"When does the {place} open?", said, f"At what time can I enter the {place}?", hour)


def _costs(place: str, rng: random.Random) -> BenchFact:
    price = rng.randrange(3, 60)
    said = f"The {place} costs {price} crowns."
    return _fact(
        "number", f"What does the {place} cost?", said, f"How much do I pay at the {place}?", str(price)
    )


def _colour(place: str, rng: random.Random) -> BenchFact:
    colour = rng.choice(COLOURS)
    said = f"The door of the {place} is {colour}."
    return _fact(
        "what",
        f"What colour has the door of the {place}?",
        said,
        f"How is the {place}'s door painted?",
        colour,
    )


def _built(place: str, rng: random.Random) -> BenchFact:
    year = str(rng.randrange(1780, 1990))
    said = f"The {place} was built in {year}."
    return _fact(
        "when", f"When was the {place} built?", said, f"Since which year has there been a {place}?", year
    )


def _shelf(thing: str, rng: random.Random) -> BenchFact:
    label = f"{rng.choice('ABCDEFGH')}{rng.randrange(10, 99)}"
    said = f"The {thing} has the label {label}."
    return _fact(
        "number", f"Which label has the {thing}?", said, f"What is written on the {thing}'s label?", label
    )


def _tasks(rng: random.Random) -> Iterator[Pair]:
    while True:
        a, b = rng.randrange(2, 50), rng.randrange(2, 50)
        word, thing, place = rng.choice(WORDS), rng.choice(THINGS), rng.choice(PLACES)
        some, (is_now, other) = rng.sample(WORDS, 3), rng.choice(OPPOSITES)
        yield f"Add up {a} and {b}.", f"{a} plus {b} is {a + b}."
        yield f"Write {word} in capitals.", word.upper()
        yield f"How many letters has the word {word}?", f"The word {word} has {len(word)} letters."
        yield f"Put these in order: {', '.join(some)}.", ", ".join(sorted(some)).capitalize() + "."
        yield f"Say the opposite: The {thing} is {is_now}.", f"The {thing} is {other}."
        yield f"Make it a question: The {place} is {is_now}.", f"Is the {place} {is_now}?"
        yield f"Tell {rng.choice(FIRST)} that the {thing} came.", f"Good news: the {thing} has arrived."
        yield f"Where did I leave my {word}?", f"I do not know where you left your {word}."


def _distinct(pairs: Iterator[Pair]) -> Iterator[Pair]:
    seen: set[str] = set()
    for pair in pairs:
        if pair[0] not in seen:
            seen.add(pair[0])
            yield pair
