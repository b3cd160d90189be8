"""Reading transcripts: each format, and each way to be broken."""

from __future__ import annotations

import pytest
from log_records import CALL, CHAT, TURNS, assistant, read_all, read_one, user, write

from apollo_curation.logs.conversation import Broken, Conversation
from apollo_ipc.wire.requests import Message


def test_openai_messages_are_read_with_tools_parts_and_thoughts(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be short", "timestamp": 3},
        user(parts, id="msg-1"),
        assistant(None, tool_calls=[{**CALL, "index": 0}], reasoning_content="hm"),
        {"role": "tool", "content": "4", "tool_call_id": "a"},
        assistant("four", weight=0),
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = read_one(tmp_path, {"messages": messages, "tools": tools, "model": "x", "created": 1})
    assert found.messages == [
        Message("developer", "be short"),
        Message("user", "a\nb"),
        Message("assistant", "", tool_calls=[CALL], reasoning_content="hm"),
        Message("tool", "4", tool_call_id="a"),
        Message("assistant", "four", weight=0),
    ]
    assert found.tools == tools
    assert (found.source.number, found.source.offset) == (1, 0)


def test_a_bare_list_of_messages_is_a_record(tmp_path):
    assert read_one(tmp_path, CHAT["messages"]).messages == TURNS


def test_a_refusal_of_openai_is_the_answer(tmp_path):
    found = read_one(tmp_path, {"messages": [user("x"), assistant(None, refusal="I cannot")]})
    assert found.messages[1].content == "I cannot"


def test_a_legacy_function_call_becomes_a_tool_call_with_its_result(tmp_path):
    call = {"name": "add", "arguments": "{}"}
    turns = [user("x"), assistant(None, function_call=call)]
    turns += [{"role": "function", "name": "add", "content": "4"}, assistant("4")]
    messages = read_one(tmp_path, {"messages": turns}).messages
    assert messages[1].tool_calls == [{"type": "function", "id": "call_1", "function": call}]
    assert messages[2] == Message("tool", "4", name="add", tool_call_id="call_1")


def test_a_conversation_may_end_in_a_tool_call(tmp_path):
    found = read_one(tmp_path, {"messages": [user("x"), assistant("", tool_calls=[CALL])]})
    assert found.messages[-1].tool_calls == [CALL]


def test_sharegpt_is_read_with_calls_and_observations(tmp_path):
    call = '{"name": "add", "arguments": {"x": 2}}'
    turns = [("system", "s"), ("human", "q"), ("function_call", call), ("observation", "4"), ("gpt", "four")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": "[]"}
    messages = read_one(tmp_path, record).messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2].tool_calls == [
        {"type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}
    ]


def test_sharegpt_calls_inside_an_answer_are_found_when_results_follow(tmp_path):
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    value = f"Both.\n{call}\n{call}"
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    turns = [("human", "q"), ("gpt", value), ("tool", results), ("gpt", "done")]
    messages = read_one(
        tmp_path, {"conversations": [{"from": who, "value": text} for who, text in turns]}
    ).messages
    assert messages[1].content == "Both."
    assert len(messages[1].tool_calls or []) == 2
    assert [message.content for message in messages[2:]] == ["1", "2", "done"]


def test_anthropic_blocks_become_tool_calls_and_tool_messages(tmp_path):
    use = [{"type": "tool_use", "id": name, "name": "get", "input": {"k": name}} for name in "ab"]
    failed = {"type": "tool_result", "tool_use_id": "b", "content": "gone", "is_error": True}
    record = {
        "system": [{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "get", "description": "d", "input_schema": {"type": "object"}}],
        "messages": [
            user("x"),
            assistant([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "let me"}, *use]),
            user(
                [
                    {
                        "type": "tool_result",
                        "tool_use_id": "a",
                        "content": [{"type": "text", "text": "1"}],
                    },
                    failed,
                    {"type": "text", "text": "quick please"},
                ]
            ),
            assistant("one"),
            user("thanks"),
            user("really"),
        ],
    }
    found = read_one(tmp_path, record)
    calls = [
        {"type": "function", "id": name, "function": {"name": "get", "arguments": f'{{"k": "{name}"}}'}}
        for name in "ab"
    ]
    assert found.messages == [
        Message("system", "be kind"),
        Message("user", "x"),
        Message("assistant", "let me", tool_calls=calls, reasoning_content="hm"),
        Message("tool", "1", tool_call_id="a"),
        Message("tool", "Error: gone", tool_call_id="b"),
        Message("user", "quick please"),
        Message("assistant", "one"),
        Message("user", "thanks\nreally"),
    ]
    assert found.tools == [
        {
            "type": "function",
            "function": {"name": "get", "description": "d", "parameters": {"type": "object"}},
        }
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{not json", "not_json"),
        (b"[" * 100_000 + b"]" * 100_000, "too_deep"),
        (b"17", "unknown_format"),
        (b"[1, 2]", "unknown_format"),
        ({"a": "a", "b": "b"}, "unknown_format"),
        ({"text": "prose"}, "plain_text"),
        ({"custom_id": "a", "response": {"body": {}}}, "answer_only"),
        ({"messages": []}, "empty"),
        ({"messages": "hello"}, "wrong_type"),
        ({"messages": ["hello"]}, "wrong_type"),
        ({"messages": [user(3)]}, "wrong_type"),
        ({"messages": [{"content": "x"}]}, "wrong_type"),
        ({"messages": [user("x"), assistant("", tool_calls=["f"])]}, "wrong_type"),
        ({"messages": [user("x"), assistant("", tool_calls=[{"id": "a"}])]}, "wrong_type"),
        ({**CHAT, "tools": {"n": 1}}, "wrong_type"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "not_text"),
        ({"messages": [user([{"type": "input_audio"}])]}, "not_text"),
        ({"messages": [user("a"), user("b")]}, "empty"),
        ({"messages": [user("a"), {"role": "tool", "content": "x"}]}, "empty"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "empty"),
        ({"conversations": [{"from": "gpt", "value": "I begin"}]}, "empty"),
        ({"conversations": [{"from": "human", "value": None}]}, "wrong_type"),
        (
            {"system": "s", "messages": [user([{"type": "image", "source": {}}])]},
            "not_text",
        ),
    ],
)
def test_a_broken_record_is_named_and_the_next_one_is_read(tmp_path, record, reason):
    broken, good = read_all(write(tmp_path / "log.jsonl", record, CHAT))
    assert isinstance(broken, Broken)
    assert (broken.reason, broken.source.number) == (reason, 1)
    assert broken.message
    assert isinstance(good, Conversation)
    assert good.source.number == 2


def test_what_python_writes_as_json_is_read(tmp_path):
    record = b'{"messages": [{"role": "user", "content": "half \\ud83d"}, %s], "loss": NaN, "x": 1e999}'
    [found] = read_all(write(tmp_path / "log.jsonl", record % b'{"role": "assistant", "content": "a"}'))
    assert [message.content for message in found.messages] == ["half ?", "a"]


@pytest.mark.parametrize(
    ("turns", "kept", "lost"),
    [
        ([user("a"), user("b"), assistant("c")], ["a\n\nb", "c"], {"messages of one role joined": 1}),
        (
            [assistant("hi"), user("a"), assistant("b")],
            ["a", "b"],
            {"assistant before the first question": 1},
        ),
        ([user("a"), assistant("b"), assistant("c")], ["a", "b\n\nc"], {"messages of one role joined": 1}),
        (
            [user("a"), assistant("b"), {"role": "system", "content": "s"}, user("c"), assistant("d")],
            ["a", "b", "c", "d"],
            {"instructions in the middle": 1},
        ),
        (
            [user("a"), assistant("let me", tool_calls=[CALL]), user("b"), assistant("c")],
            ["a", "let me", "b", "c"],
            {"tool call without a result": 1},
        ),
        (
            [user("a"), {"role": "tool", "content": "4"}, assistant("b")],
            ["a", "b"],
            {"tool result without a call": 1},
        ),
        ([user("a"), {"role": "wizard", "content": "x"}, assistant("b")], ["a", "b"], {"role wizard": 1}),
        ([user("a"), assistant("", tool_calls=[CALL, CALL])], ["a", ""], {"duplicate_id": 1}),
    ],
)
def test_what_does_not_fit_is_left_out_by_name_and_the_rest_kept(tmp_path, turns, kept, lost):
    found = read_one(tmp_path, {"messages": turns})
    assert [message.content for message in found.messages] == kept
    assert found.lost == lost


@pytest.mark.parametrize(
    ("more", "topic"),
    [
        ({"topic": "cooking"}, "cooking"),
        ({"project": "apollo"}, "apollo"),
        ({"tags": ["x", "y"]}, "x"),
        ({"metadata": {"topic": "deep"}}, "deep"),
        ({"topic": 3, "tags": []}, "log"),
    ],
)
def test_the_topic_is_what_the_record_says_else_the_files_name(tmp_path, more, topic):
    assert read_one(tmp_path, {**CHAT, **more}).topic == topic
