"""The short stretch of a conversation that leads to one decision."""

from __future__ import annotations

from apollo_ipc.wire.requests import Message

SEGMENT_MESSAGES = 8  # before a decision, so many are kept


def segment(messages: list[Message], at: int, num_messages: int) -> list[Message]:
    """The context of the decision messages[at], an assistant's message of a valid conversation.

    At most num_messages messages, from a user's message on, as many as fit; instructions at the beginning,
    where there still are any, come on top. Where not even the decision's own turn fits, its question stays
    and the oldest of its tool calls go, each with its results; the last call stays however long it is.
    """
    assert messages[at].role == "assistant"
    instructions = [message for message in messages[:at] if message.role in ("system", "developer")]
    questions = [i for i in range(at) if messages[i].role == "user"]
    fitting = [i for i in questions if at - i <= num_messages]
    if fitting:
        return instructions + messages[fitting[0] : at]
    question = questions[-1]
    rounds = [i for i in range(question + 1, at) if messages[i].role == "assistant"]
    start = next((i for i in rounds if at - i < num_messages), rounds[-1])
    return [*instructions, messages[question], *messages[start:at]]
