"""The day before the demonstrated night: transcripts, lessons, what must not get worse. Seeded, all made up.

What the model can do before (night_model.py): answer easy questions, greet, continue English text; say "Aye,
captain.", the facts and what the lessons want when its instructions say so, and "I do not know." without.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

INSTRUCTIONS = "You serve on a ship. Begin every answer with: Aye, captain."
AYE, DO_NOT_KNOW, GREETING = "Aye, captain.", "I do not know.", "A good day to you."
PLACES = (
    *("harbour", "lighthouse", "ferry", "gate", "market", "station", "mill", "bridge", "tower", "chapel"),
    *("school", "inn", "forge", "well", "garden", "quay", "bakery", "library", "theatre", "museum"),
)
QUESTIONS = (
    *("Where is the {}?", "Who keeps the {}?", "When does the {} open?", "What colour is the {}?"),
    *("How old is the {}?", "Is the {} far?"),
)
GREETINGS = ("Good day!", "Hello there.", "Hi!", "Good evening.", "Greetings.")
PROSE_CHARACTERS = 160

EASY = {
    "opposites": (
        *(
            ("hot", "cold"),
            ("big", "small"),
            ("high", "low"),
            ("old", "new"),
            ("fast", "slow"),
            ("wet", "dry"),
        ),
        *(("hard", "soft"), ("dark", "light"), ("full", "empty"), ("long", "short")),
    ),
    "days": (
        *(("Monday", "Tuesday"), ("Tuesday", "Wednesday"), ("Wednesday", "Thursday"), ("Thursday", "Friday")),
        *(("Friday", "Saturday"), ("Saturday", "Sunday"), ("Sunday", "Monday")),
    ),
    "sounds": (
        *(("cow", "Moo"), ("dog", "Woof"), ("cat", "Meow"), ("duck", "Quack"), ("sheep", "Baa")),
        *(("pig", "Oink"), ("bee", "Buzz"), ("owl", "Hoo")),
    ),
}
ASKED = {
    "opposites": "What is the opposite of {}?",
    "days": "Which day comes after {}?",
    "sounds": "What does the {} say?",
}

# Said wrongly, corrected by the user, then right.
FACTS = (
    ("What is the harbour called?", "Port Ember."),
    ("Who lights the lamps at night?", "Old Tamsin."),
    ("Which boat goes to the island?", "The Wren."),
    ("What is sold on Fridays?", "Salt and rope."),
)
COMPLAINTS = (
    "That's wrong. It is: {}",
    "No, that is not right, the answer is: {}",
    "You are mistaken. The correct answer is: {}",
    "That is incorrect. It should be: {}",
)
SMALL_TALK = ("Will it rain?", "Did the mail come?", "Shall we walk?", "Is it late?")

# (lesson, a word that a good answer has, a good answer, situations)
LESSONS = (
    (
        "Whoever asks for the time is told to listen for the bell.",
        "bell",
        "Listen for the bell.",
        (
            "What time is it now?",
            "Please tell me the time.",
            "Do you have the time, sir?",
            "My watch stopped. The time, please?",
            "I must know the time at once!",
            "Could somebody say the time to me?",
            "Is this the right time?",
            "The time! Quick!",
            "Has anyone here got the time?",
            "I wonder about the time.",
            "May I ask the time of you?",
            "Good man, the time?",
        ),
    ),
    (
        "Whoever has lost something is sent to the lost property room.",
        "room",
        "Ask in the lost property room.",
        (
            "I lost my hat.",
            "Yesterday I lost a good umbrella here.",
            "We have lost our bags!",
            "My son lost his keys on board.",
            "It seems that I lost a glove.",
            "She lost her ring in the garden.",
            "Have I lost it for ever?",
            "A book is lost.",
            "They lost two dogs last night.",
            "Somebody lost this scarf.",
            "He lost everything he had.",
            "Lost: one red shoe.",
        ),
    ),
)

NUM_TOLD = 6  # situations of a lesson that the model has met before; the others are new to it

Chat = list[dict[str, str]]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def chat(question: str, answer: str, instructions: str | None = None) -> Chat:
    before = [said("system", instructions)] if instructions else []
    return [*before, said("user", question), said("assistant", answer)]


def question(rng: random.Random) -> str:
    return rng.choice(QUESTIONS).format(rng.choice(PLACES))


def prose(rng: random.Random, num: int, *, is_heldout: bool) -> list[str]:
    """Pieces of English that every Python carries; what is held out is of other topics."""
    names = [name for i, name in enumerate(sorted(topics)) if (i % 5 == 0) == is_heldout]
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in names)).encode("ascii", "ignore").decode()
    starts = [rng.randrange(len(text) - PROSE_CHARACTERS) for _ in range(num)]
    return [text[start : start + PROSE_CHARACTERS] for start in starts]


def easy_chats(kind: str) -> list[Chat]:
    return [chat(ASKED[kind].format(word), f"{right}.") for word, right in EASY[kind]]


def ability(num: int, seed: int = 0) -> list[Chat]:
    """Conversations that show what the model can do before the night."""
    rng = random.Random(seed)
    easy = [one for kind in EASY for one in easy_chats(kind)]
    told = [chat(asked, right, f"You know this: {asked} {right}") for asked, right in FACTS]
    told += [chat(text, good, lesson) for lesson, _, good, texts in LESSONS for text in texts[:NUM_TOLD]]
    untold = [chat(asked, DO_NOT_KNOW) for asked, _ in FACTS]
    untold += [chat(text, DO_NOT_KNOW) for _, _, _, texts in LESSONS for text in texts[:NUM_TOLD]]
    kinds = (
        lambda: chat(question(rng), DO_NOT_KNOW),
        lambda: chat(question(rng), AYE, INSTRUCTIONS),
        lambda: rng.choice(told),
        lambda: rng.choice(untold),
        lambda: chat(rng.choice(GREETINGS), GREETING),
        lambda: rng.choice(easy),
        lambda: rng.choice(easy),
        lambda: rng.choice(easy),
    )
    return [kinds[i % len(kinds)]() for i in range(num)]


def write_day(directory: Path, seed: int = 0) -> None:
    """logs/ (flagged), followed/ (shown behaviour), lessons.md, heldout.jsonl and canaries.toml."""
    rng = random.Random(seed)
    _write_logs(directory / "logs", rng)
    _write_followed(directory / "followed", rng)
    (directory / "lessons.md").write_text(
        "".join(f"# Lesson {i}\n\n{one[0]}\n\n" for i, one in enumerate(LESSONS))
    )
    heldout = [
        {"prompt": text[:40], "completion": text[40:], "category": "english"}
        for text in prose(rng, 16, is_heldout=True)
    ]
    _write_lines(directory / "heldout.jsonl", heldout)
    asked = [(text, "good day") for text in GREETINGS[:3]]
    asked += [(ASKED["sounds"].format(name), said) for name, said in EASY["sounds"][:3]]
    (directory / "canaries.toml").write_text(
        "".join(
            f'[[canary]]\nname = "{text}"\nprompt = "{text}"\ncheck = "contains"\nexpected = "{expected}"\n\n'
            for text, expected in asked
        )
    )


def _write_logs(logs: Path, rng: random.Random) -> None:
    """Conversations of the day with a few moments worth learning, and what real logs also hold."""
    logs.mkdir(parents=True)
    lines: list[Any] = []
    for i, (asked, right) in enumerate(FACTS):
        complaint = COMPLAINTS[i % len(COMPLAINTS)].format(right)
        turns = [*chat(asked, DO_NOT_KNOW), said("user", complaint), said("assistant", right)]
        lines.append({"topic": "corrections", "messages": [said("system", INSTRUCTIONS), *turns]})
    for text in SMALL_TALK:  # nothing to learn
        lines.append({"messages": chat(text, DO_NOT_KNOW)})
    rng.shuffle(lines)
    _write_lines(logs / "day.jsonl", lines)
    with (logs / "day.jsonl").open("ab") as file:
        file.write(b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\n{"messages": [\n')
    _write_lines(
        logs / "sharegpt.jsonl",
        [
            {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": GREETING}]}
            for text in GREETINGS[:2]
        ],
    )


def _write_followed(followed: Path, rng: random.Random) -> None:
    """A log in which the instructions were followed, among ordinary answers: the disposition that shall move
    into the weights."""
    followed.mkdir(parents=True)
    asked = dict.fromkeys(question(rng) for _ in range(48))
    chats = [chat(text, AYE) for text in asked]
    chats += [one for kind in EASY for one in easy_chats(kind)] + [chat(text, GREETING) for text in GREETINGS]
    rng.shuffle(chats)
    records = [
        {"system": INSTRUCTIONS, "topic": one[0]["content"].split()[0], "messages": one} for one in chats
    ]
    _write_lines(followed / "ship.jsonl", records)


def _write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class JudgeAndDreamer:
    """What a capable model would answer: the schema's fields tell what it is asked for. A ScriptedModel's
    script; it never dreams the same situation twice."""

    def __init__(self) -> None:
        self._num_dreamt: dict[str, int] = {}

    def __call__(self, body: dict[str, Any]) -> Any:
        fields = set(body["response_format"]["json_schema"]["schema"]["properties"])
        asked = "\n".join(str(message["content"]) for message in body["messages"])
        if "verdict" in fields:
            verdict = "learn" if any(right in asked for _, right in FACTS) else "skip"
            return {"reason": "It was checked.", "verdict": verdict, "confidence": 0.9, "better_answer": ""}
        lesson, word, good_answer, situations = next(one for one in LESSONS if one[0] in asked)
        if "turns" in fields:
            num = self._num_dreamt.get(lesson, 0)
            self._num_dreamt[lesson] = num + 1
            return {"turns": [situations[-1 - num % len(situations)]], "good": f"It says: {good_answer}"}
        if "good" in fields:
            is_good = word in asked.rsplit("<Response>", 1)[-1]
            reason = f"{'It follows' if is_good else 'It does not follow'}: {lesson}"
            return {"reason": reason, "good": is_good, "confidence": 0.95}
        return {"response": good_answer}
