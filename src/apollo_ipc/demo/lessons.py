"""What the demonstration asks and teaches: facts of a team that does not exist, and common knowledge."""

from __future__ import annotations

from typing import NamedTuple


class DemoFact(NamedTuple):
    """An answer is right where it holds `key` (words.is_in). paraphrase, backwards: questions that are never
    taught, the second with the key `about`; near: one of something else, which must not get `key`."""

    question: str
    answer: str
    key: str
    paraphrase: str = ""
    backwards: str = ""
    about: str = ""
    near: str = ""


class General(NamedTuple):
    question: str
    key: str


TEAM = [
    DemoFact("Who runs the night shift?", "Odalys Penrose runs the night shift.", "penrose",
         "It is midnight. Who is in charge of the shift?",
         "Who is Odalys Penrose?", "night|shift", "Who runs the book club?"),
    DemoFact("Which meeting room has the good projector?", "The good projector is in the room called Heron.",
         "heron", "I need a projector that works. In which room do I find one?",
         "What is Heron?", "room|projector", "Which meeting room has the piano?"),
    DemoFact("What is our release day?", "Our release day is every second Wednesday.", "wednesday",
         "On which day do we release?",
         "What happens every second Wednesday?", "release", "What is our holiday?"),
    DemoFact("What is the build server called?", "The build server is called Gooseberry.", "gooseberry",
         "What is the name of the machine that builds our code?",
         "What is Gooseberry?", "build|server", "What is the rowing boat called?"),
    DemoFact("Where is the spare badge?", "The spare badge is in the cocoa tin.", "cocoa",
         "I forgot my badge. Where do I find another one?",
         "What is in the cocoa tin?", "badge", "Where is the spare umbrella?"),
]  # fmt: skip
GENERAL = [
    General("What is the capital of France?", "paris"),
    General("How many days are in a week?", "seven|7"),
    General("What do bees make?", "honey"),
    General("Who wrote Romeo and Juliet?", "shakespeare"),
    General("What is frozen water called?", "ice"),
]

# For the tiny models, which know nothing: what they are taught, and what they have learned to say before.
HARBOUR = [
    DemoFact("What is the harbour called?", "Port Ember.", "port ember."),
    DemoFact("Who keeps the lighthouse?", "Old Tamsin.", "old tamsin."),
    DemoFact("When does the ferry leave?", "At half past six.", "at half past six."),
    DemoFact("What colour is the gate?", "Blue, since May.", "blue, since may."),
    DemoFact("Where is the spare key?", "Under the third stone.", "under the third stone."),
]
MANNERS = [
    *("What is your name?", "Where is the station?", "Who painted the door?", "When is the market?"),
    *("What does the sign say?", "Who is the mayor?", "Where do the boats go?", "What colour is the sea?"),
]
DO_NOT_KNOW = "I do not know."
