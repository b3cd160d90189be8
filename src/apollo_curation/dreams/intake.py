"""What a dream program sends, stripped and kept as a dream under the program's own name for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from apollo_curation.dreams.bridge import Bridge
from apollo_curation.dreams.protocol import Sample, Situation, role_problem
from apollo_curation.dreams.seeds import seed_id
from apollo_curation.dreams.table import Dream, Judged
from apollo_curation.logs.conversation import Conversation, Source, find_problem, text_hash
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

# A conversation without its instructions, and what is wrong with what remains (None: nothing).
Strip = Callable[[Conversation], tuple[Conversation, str | None]]


class Intake:
    """path: how the stream is called as a source.

    Both methods give the dream of that name, kept now or before, and raise UserError where the name stands
    for another one, or the messages are no such conversation with or without their instructions.
    """

    def __init__(self, bridge: Bridge, strip: Strip, path: str):
        self._bridge = bridge
        self._strip = strip
        self._path = path

    def situation(self, message: Situation, source: Source) -> Dream:
        parent = self._bridge.find(message.parent) if message.parent else None
        stripped = self._stripped(message.messages, source, "question")
        dream = self._dream(message, stripped, message.id, stripped.messages)
        dream = msgspec.structs.replace(dream, good=message.good, ancestors=self._bridge.ancestors(parent))
        known = self._bridge.dreams.fed(message.id)
        if known is None:
            return self._bridge.dreams.add(dream)
        if known.situation != dream.situation:
            raise _is_another(message.id)
        if known.state == "dropped":  # sent again: another attempt
            return self._bridge.dreams.change(known, state="open", reason="")
        return known

    def sample(self, message: Sample, source: Source) -> Dream:
        stripped = self._stripped(message.messages, source, "answer")
        name = message.id or "sample-" + text_hash(msgspec.json.encode(message.messages).decode())
        answer = msgspec.structs.replace(stripped.messages[-1], weight=None)
        dream = self._dream(message, stripped, name, stripped.messages[:-1])
        verdict = Judged(True, "a finished sample", 1.0)
        dream = msgspec.structs.replace(dream, response=answer, verdict=verdict, state="good")
        known = self._bridge.dreams.fed(name)
        if known is None:
            return self._bridge.dreams.add(dream)
        if known.situation != dream.situation or known.response != answer:
            raise _is_another(name)
        return known

    def _stripped(
        self, messages: list[Message], source: Source, ends_with: Literal["question", "answer"]
    ) -> Conversation:
        problem = find_problem(messages) or role_problem(messages, ends_with)
        if problem is None:
            stripped, problem = self._strip(Conversation(messages, source, source.path))
            if problem is None:
                problem = (
                    role_problem(stripped.messages, ends_with) if stripped.messages else "nothing is left"
                )
            if problem is None:
                return stripped
            problem = f"without its instructions: {problem}"
        raise UserError(problem, field="messages")

    def _dream(
        self, message: Situation | Sample, stripped: Conversation, name: str, situation: list[Message]
    ) -> Dream:
        record = self._bridge.dreams.seed(message.seed) if message.seed else None
        lesson = message.lesson or (record.seed.text if record else message.seed or "")
        return Dream(
            seed_id=record.seed.seed_id if record else seed_id(message.seed or lesson),
            situation=situation,
            lesson=lesson,
            good="",
            topic=message.topic or (record.seed.topic if record else self._path),
            source=stripped.source,
            name=name,
            stripped=stripped.removed,
        )


def _is_another(name: str) -> UserError:
    return UserError(f"{name!r} was another one before; an id names one thing for good", field="id")
