"""The dreamer: makes situations, judges responses, writes better ones. It is the judge's model."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from apollo_curation.chat_client import ChatClient, ServerRefused
from apollo_curation.dreams import prompts
from apollo_curation.dreams.table import Dream, Judged
from apollo_curation.settings import CurationConfig
from apollo_curation.structured import Counts, ask_for
from apollo_curation.training.near_duplicates import Shingles, similarity, triples
from apollo_ipc.wire.requests import Message

# Of word triples (Jaccard): from here on a situation is a repetition. Far below curation.near_duplicate: two
# examples that differ by a few names are two, but the second one is no new situation.
MAX_SIMILARITY = 0.5
MAX_REPEATS = 3  # a dreamer that repeats itself is asked again so many times
NUM_IMPROVEMENTS = 2  # attempts at a response that is judged good
NUM_EARLIER_SHOWN = 5  # situations that the dreamer is shown to avoid

_SPEAKER = re.compile(r"\s*(?:user|person|human|assistant)\s*:\s*", re.IGNORECASE)

T = TypeVar("T", bound=msgspec.Struct)


class NoAnswer(Exception):
    """A step of a dream got no usable answer. reason: a sentence."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class NothingNew(NoAnswer):
    """The dreamer only repeats earlier situations of this seed."""


class Imagined(msgspec.Struct, frozen=True):
    situation: list[Message]
    good: str


class Dreamer:
    """counts: how its answers parsed; num_repeats: situations that were no news.

    Every method raises NoAnswer where two answers did not parse or say nothing, and as ChatClient.chat does
    where the server is away or refuses more than this request.
    """

    def __init__(self, model: ChatClient, config: CurationConfig):
        self.counts = Counts()
        self.num_repeats = 0
        self._model = model
        self._max_tokens = config.judge.max_tokens
        self._temperature = config.dream.temperature

    def imagine(self, lesson: str, parent: list[Message] | None, earlier: list[list[Message]]) -> Imagined:
        """A situation unlike all `earlier` ones (of which `parent`, where given, is varied).

        Raises NothingNew when MAX_REPEATS more attempts gave no new one.
        """
        shown = [messages for messages in earlier if messages != parent]
        for _ in range(1 + MAX_REPEATS):
            asked = prompts.imagine(lesson, parent, shown[-NUM_EARLIER_SHOWN:])
            answer = self._ask(prompts.Situation, asked, self._temperature)
            situation = _as_messages(answer.turns)
            if situation is None:
                self.counts.num_dropped += 1
                raise NoAnswer("the dreamer's situation has a turn without text")
            if is_novel(situation, earlier):
                return Imagined(situation, answer.good.strip())
            self.num_repeats += 1
            shown.append(situation)
        raise NothingNew(f"the dreamer repeated earlier situations {1 + MAX_REPEATS} times in a row")

    def judge(self, dream: Dream) -> Judged:
        """The verdict on the dream's response."""
        assert dream.response is not None
        if not dream.response.content.strip():
            return Judged(False, "the response is empty", 1.0)
        if dream.is_cut_off:  # however good it is so far, learned it would be a sentence that breaks off
            return Judged(False, "the response was cut off at dream.max_tokens", 1.0)
        asked = prompts.judge(dream.lesson, dream.good, dream.situation, dream.response.content)
        verdict = self._ask(prompts.DreamVerdict, asked)
        return Judged(verdict.good, verdict.reason, min(max(verdict.confidence, 0.0), 1.0))

    def improve(self, dream: Dream) -> Message:
        """The response that should have been given: one that is judged good itself, at the second attempt at
        the latest."""
        assert dream.response is not None
        assert dream.verdict is not None
        response, reason = dream.response.content, dream.verdict.reason
        for _ in range(NUM_IMPROVEMENTS):
            case = (dream.lesson, dream.good, dream.situation, response, reason)
            better = self._ask(prompts.Better, prompts.improve(*case)).response.strip()
            if not better or better == dream.response.content.strip():
                self.counts.num_dropped += 1
                raise NoAnswer(f"the dreamer's better response is {'the same' if better else 'empty'}")
            asked = prompts.judge(dream.lesson, dream.good, dream.situation, better)
            verdict = self._ask(prompts.DreamVerdict, asked)
            if verdict.good:
                return Message("assistant", better)
            response, reason = better, verdict.reason
        self.counts.num_dropped += 1
        raise NoAnswer(f"the dreamer's better response was judged bad as well: {reason}")

    def _ask(self, kind: type[T], messages: list[Message], temperature: float = 0.0) -> T:
        try:
            answer = ask_for(
                kind,
                self._model,
                messages,
                max_tokens=self._max_tokens,
                temperature=temperature,
                counts=self.counts,
            )
        except ServerRefused as error:
            if not error.is_of_this_request:
                raise
            self.counts.num_dropped += 1
            raise NoAnswer(f"the dreamer's server refused the request: {error.said}") from None
        if answer is None:
            raise NoAnswer(f"two answers of the dreamer were no {kind.__name__.lower()} in JSON")
        return answer


def _as_messages(turns: list[str]) -> list[Message] | None:
    """Person and assistant in turn, ending with the person; None where a turn is empty or none is there."""
    texts = [_SPEAKER.sub("", turn, count=1) if _SPEAKER.match(turn) else turn for turn in turns]
    texts = [text.strip() for text in texts]
    if len(texts) % 2 == 0:  # the dreamer answered for the assistant as well: that is for the learner to do
        texts = texts[:-1]
    if not texts or not all(texts):
        return None
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def is_novel(situation: list[Message], earlier: list[list[Message]]) -> bool:
    own = _triples(situation)
    return all(similarity(own, _triples(other)) < MAX_SIMILARITY for other in earlier)


def _triples(messages: list[Message]) -> Shingles:
    return triples("\n".join(message.content for message in messages))
