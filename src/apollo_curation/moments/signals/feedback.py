"""What people said of an answer by `POST /feedback`: no rule has to guess."""

from __future__ import annotations

from apollo_curation.logs.conversation import Conversation
from apollo_curation.moments.signals.evidence import Noticed
from apollo_ipc.wire.requests import Message

CONFIDENCE = 0.9  # whoever clicks may err, too


def find_feedback(conversation: Conversation) -> Noticed | None:
    """Of the last message, an answer in words or calls."""
    said, messages = conversation.feedback, conversation.messages
    if said is None or not messages or messages[-1].role != "assistant":
        return None
    at, end = len(messages) - 1, len(messages)
    if said.correction:
        answer = Message("assistant", said.correction)
        return Noticed(
            "correction", at, end, answer, "Somebody wrote what the answer should be.", CONFIDENCE, True
        )
    if said.rating == "up":
        return Noticed(
            "praise", at, end, messages[at], "Somebody rated the answer as good.", CONFIDENCE, True
        )
    return Noticed("correction", at, end, None, "Somebody rated the answer as bad.", CONFIDENCE, True)
