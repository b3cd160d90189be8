"""Cheap rules that notice moments worth learning in a conversation: no model is asked.

What the confidence is made of stands in evidence.py; which phrases are looked for, in curation/phrases.py.
"""

from __future__ import annotations

from apollo_curation.logs.conversation import Conversation
from apollo_curation.logs.strip import Stripped, strip
from apollo_curation.moments.moments import Moment
from apollo_curation.moments.segments import Segments
from apollo_curation.moments.signals.evidence import Noticed
from apollo_curation.moments.signals.feedback import find_feedback
from apollo_curation.moments.signals.reactions import find_reactions
from apollo_curation.moments.signals.repairs import find_repairs
from apollo_curation.settings import StripRule

MAX_AFTERMATH = 8  # messages that followed, kept for the judge and for a person


def flag(original: Conversation, rules: list[StripRule], num_messages: int) -> list[Moment]:
    """The moments of one conversation, in its order; none where it is no valid one after stripping (strip
    says why). num_messages: see segments.Segments."""
    return flag_stripped(strip(original, rules), num_messages)


def flag_stripped(stripped: Stripped, num_messages: int) -> list[Moment]:
    """As `flag`, for those who have stripped already."""
    if stripped.problem:
        return []
    messages = stripped.conversation.messages
    noticed = [*find_reactions(messages), *find_repairs(messages)]
    if told := find_feedback(stripped.conversation):
        noticed.append(told)
    # A praised answer of weight 0 is not to be learned; that another one of it was mended may be.
    noticed = [one for one in noticed if one.kind != "praise" or messages[one.at].weight != 0]
    noticed.sort(key=lambda one: one.at)
    segments = Segments(messages, num_messages)
    return [_moment(stripped.conversation, one, segments) for one in noticed]


def _moment(conversation: Conversation, noticed: Noticed, segments: Segments) -> Moment:
    at, messages = noticed.at, conversation.messages
    decided = messages[at]
    return Moment(
        kind=noticed.kind,
        tier="direct",
        context=segments.before(at),
        answer=noticed.answer,
        original=None if noticed.kind == "praise" else decided,
        aftermath=messages[at + 1 : min(noticed.end, at + 1 + MAX_AFTERMATH)],
        source=conversation.source,
        topic=conversation.topic,
        tools=conversation.tools,
        stripped=conversation.removed,
        reason=noticed.reason,
        confidence=noticed.confidence,
        is_told=noticed.is_told,
    )
