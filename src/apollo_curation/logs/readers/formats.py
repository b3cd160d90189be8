"""Which format a record has, by its content."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apollo_curation.logs.readers import (
    anthropic,
    chatgpt,
    claude_ai,
    datasets,
    gemini,
    open_webui,
    openai,
    openhands,
    responses,
    served,
    sharegpt,
    swe_agent,
    tracing,
)
from apollo_curation.logs.readers.text import RawChat, Unreadable, of_another_kind

Record = dict[str, Any]


def read_chats(record: Record) -> list[RawChat]:
    """By the adapter of its format: one conversation, or those that it holds. Raises Unreadable."""
    for is_it, read in FORMATS:
        if is_it(record):
            with of_another_kind():
                found = read(record)
            return found if isinstance(found, list) else [found]
    keys = ", ".join(sorted(map(repr, record))[:8]) or "none"
    raise Unreadable("unknown_format", f"its keys are {keys}; docs/logs.md names the formats that are known")


def _has_turns(record: Record) -> bool:
    return any(record.get(key) is not None for key in openai.KEYS)


def _read_turns(record: Record) -> RawChat:
    key = next(key for key in openai.KEYS if record.get(key) is not None)
    turns = record[key]
    if isinstance(turns, list) and not turns:
        raise Unreadable("empty", f"{key} is empty")
    if isinstance(turns, list) and isinstance(turns[0], dict) and "from" in turns[0]:
        return sharegpt.read_chat(record)
    if key == "messages" and isinstance(turns, list) and anthropic.is_anthropic(record):
        return anthropic.read_chat(record)
    return openai.read_chat(record)


def _has_simulations(record: Record) -> bool:
    return isinstance(record.get("simulations"), list)


def _read_simulations(record: Record) -> list[RawChat]:
    """tau-bench's second version."""
    found = [one for one in record["simulations"] if isinstance(one, dict) and one.get("messages")]
    return [openai.read_chat(one) for one in found]


# The first that fits: what is more particular stands before what is less.
FORMATS: list[tuple[Callable[[Record], bool], Callable[[Record], RawChat | list[RawChat]]]] = [
    (chatgpt.is_record, chatgpt.read_chat),
    (claude_ai.is_record, claude_ai.read_chat),
    (open_webui.is_record, open_webui.read_chat),
    (gemini.is_session, gemini.read_session),
    (gemini.is_contents, gemini.read_contents),
    (swe_agent.is_record, swe_agent.read_chat),
    (openhands.is_record, openhands.read_chat),
    (_has_simulations, _read_simulations),
    (served.is_record, served.read_chat),
    (_has_turns, _read_turns),
    (responses.is_record, responses.read_chat),
    (tracing.is_langsmith, tracing.read_langsmith),
    (datasets.is_pair, datasets.read_pair),
    (datasets.is_completion, datasets.read_completion),
    (datasets.is_alpaca, datasets.read_alpaca),
    (tracing.is_langfuse, tracing.read_langfuse),
    (datasets.is_text, datasets.read_text),
]
