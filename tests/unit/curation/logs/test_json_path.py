"""Rules of the kind `json_path`, which take parts of a record before it is read."""

from __future__ import annotations

import pytest
from log_records import CALL, CHAT, assistant, prune_by, read_all, read_one, user, write

from apollo_curation.logs.conversation import Broken
from apollo_curation.logs.strip import pruner
from apollo_curation.settings import StripRule
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message


def test_a_json_path_takes_parts_of_the_record_and_what_depended_on_them(tmp_path):
    turns = [
        user("x"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "recall", "content": "a memory", "tool_call_id": "a"},
        assistant("y"),
    ]
    record = {"messages": turns, "memory": {"secret": 1}}
    rules = ("$.memory", "$.messages[?@.name == 'recall']")
    found = read_one(tmp_path, record, prune=prune_by(*rules))
    assert found.messages == [Message("user", "x"), Message("assistant", "y")]
    assert len(found.removed) == 3  # the memory, the recalled message, the call
    assert read_one(tmp_path, CHAT, prune=prune_by(*rules)).removed == []


@pytest.mark.parametrize(
    ("path", "roles"),
    [
        ("$.messages[1]", ["assistant", "user", "assistant"]),
        ("$.messages[1].content", ["assistant", "user", "assistant"]),
        ("$.messages[0].content", ["user", "assistant"]),
        ("$.messages[0, 2]", []),
        ("$.messages[?@.role == 'user']", []),
        ("$.messages[0].tool_calls[0]", ["user", "assistant", "user", "assistant"]),
    ],
)
def test_whatever_a_json_path_takes_the_rest_is_a_conversation_or_broken(tmp_path, path, roles):
    record = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    [found] = read_all(write(tmp_path / "log.jsonl", record), prune=prune_by(path))
    if isinstance(found, Broken):
        assert (found.reason, roles) == ("empty", [])
    elif path.endswith("[1]") or path.endswith("[1].content"):
        assert [message.content for message in found.messages] == ["c", "d"]
    else:
        assert [message.role for message in found.messages] == roles


def test_a_tool_call_taken_by_a_json_path_takes_its_result_along(tmp_path):
    turns = [user("x"), assistant("let me see", tool_calls=[CALL])]
    turns += [{"role": "tool", "content": "4", "tool_call_id": "a"}, assistant("y")]
    found = read_one(tmp_path, {"messages": turns}, prune=prune_by("$.messages[*].tool_calls"))
    assert [message.content for message in found.messages] == ["x", "y"]


def test_messages_of_a_role_of_ones_own_and_late_instructions_are_taken_out_before_reading(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        user("a"),
        {"role": "memory", "content": "m"},
        assistant("b"),
        {"role": "system", "content": "late"},
    ]
    rules = [StripRule(role="memory"), StripRule(role="system")]
    found = read_one(tmp_path, {"messages": turns}, prune=pruner(rules))
    # The leading one is left to strip.strip, which shows it in its preview.
    assert [message.content for message in found.messages] == ["s", "a", "b"]
    assert len(found.removed) == 2


@pytest.mark.parametrize("path", ["$.messages[", "$.a[?", "no path at all ]"])
def test_a_json_path_that_cannot_be_read_is_a_users_mistake(path):
    with pytest.raises(UserError, match="JSON path"):
        prune_by(path)


@pytest.mark.parametrize("path", ["$", "$.messages[?match(@.content, '(')]", "$.messages[?@.content < 3]"])
def test_a_json_path_never_raises_at_a_record(tmp_path, path):
    [found] = read_all(write(tmp_path / "log.jsonl", CHAT), prune=prune_by(path))
    if path == "$":
        assert isinstance(found, Broken)
        assert found.reason == "rule_failed"
