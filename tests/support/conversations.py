"""Conversations of a few words."""

from __future__ import annotations

import json

from apollo_curation.logs.conversation import Conversation, Origin, find_problem
from apollo_ipc.wire.requests import Message


def call(name, **arguments):
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }


def conversation(*turns):
    """Texts in turn by user and assistant; a dict is an assistant's call, a tuple the tool's result."""
    messages, speaker = [], "user"
    for turn in turns:
        if isinstance(turn, tuple):
            messages.append(Message("tool", turn[0], tool_call_id="c"))
        elif isinstance(turn, dict):
            messages.append(Message(**turn))
            speaker = "assistant"
        else:
            messages.append(Message(speaker, turn))
            speaker = "user" if speaker == "assistant" else "assistant"
    assert find_problem(messages) is None
    return Conversation(messages, Origin("log.jsonl", 1, 0), "log")
