"""Logs that already show the wanted behaviour: every answer in them is learned, without its instructions."""

from __future__ import annotations

from apollo_curation.logs.strip import Stripped
from apollo_curation.moments.moments import Moment
from apollo_curation.moments.segments import Segments

REASON = "an answer in a log that is to be followed (curation.bootstrap)"


def follow_behaviour(stripped: Stripped, num_messages: int) -> list[Moment]:
    """A moment of the tier `bootstrap`, approved, for each answer and tool call of a conversation.

    Whoever names a log as one to be followed has judged it. Empty where nothing valid is left of it when the
    instructions are gone. num_messages: of the context, see Segments.
    """
    if stripped.problem is not None:
        return []
    conversation, messages = stripped.conversation, stripped.conversation.messages
    segments = Segments(messages, num_messages)
    return [
        Moment(
            kind="behaviour",
            tier="bootstrap",
            context=segments.before(i),
            answer=message,
            source=conversation.source,
            topic=conversation.topic,
            reason=REASON,
            confidence=1.0,
            tools=conversation.tools,
            stripped=conversation.removed,
            state="approved",
        )
        for i, message in enumerate(messages)
        if message.role == "assistant"
        and message.weight != 0
        and (message.content.strip() or message.tool_calls)
    ]
