"""Each format, on a small file that is written as its description says: no turn is lost without a name.

The table of docs/logs.md is what this test counts.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from log_records import CHAT, assistant, read_all, read_one, user, write

from apollo_curation.logs.conversation import Broken, Conversation, find_problem
from apollo_curation.logs.readers import sessions

ASSETS = Path(__file__).parents[3] / "assets" / "logs"
DOCS = Path(__file__).parents[4] / "docs" / "logs.md"

# File, format, and how many turns a person counts in it: questions, replies and results, other branches too.
FILES = {
    "claude_code.jsonl": ("Claude Code session", 19),
    "codex.jsonl": ("Codex rollout", 10),
    "gemini_cli.json": ("Gemini CLI session", 7),
    "gemini_cli.jsonl": ("Gemini CLI, a line a message", 5),
    "openhands.json": ("OpenHands events", 6),
    "openhands_sdk.jsonl": ("OpenHands SDK events", 4),
    "swe_agent.traj": ("SWE-agent trajectory", 7),
    "mini_swe_agent.traj.json": ("mini-swe-agent", 4),
    "chatgpt.json": ("ChatGPT export", 7),
    "claude_ai.json": ("Claude.ai export", 5),
    "open_webui.json": ("Open WebUI export", 4),
    "openai.jsonl": ("OpenAI chat messages", 8),
    "anthropic.jsonl": ("Anthropic messages", 6),
    "responses.jsonl": ("OpenAI Responses items", 4),
    "batch.jsonl": ("Batch files, request + response", 5),
    "litellm.jsonl": ("LiteLLM", 4),
    "langfuse.json": ("Langfuse export", 2),
    "langsmith.jsonl": ("LangSmith export", 4),
    "lmsys.jsonl": ("LMSYS, WildChat", 2),
    "sharegpt.json": ("ShareGPT", 2),
    "tau_bench.json": ("tau-bench", 4),
    "alpaca.json": ("Alpaca", 4),
    "kto.jsonl": ("KTO, prompt + completion", 4),
    "dpo.jsonl": ("DPO pairs", 6),
}
# Losses that are whole turns; others are blocks, notes of programs, or answers that are read and not learned.
TURNS = (
    "other branch",
    "injected: ",
    "isMeta",
    "isCompactSummary",
    "demonstration",
    "rejected answer",
    "other choice",
    "answer_only",
    "no response",
    "assistant before",
    "messages of one role joined",
)


def count(name: str) -> tuple[int, Counter[str]]:
    """Turns read, and what was lost, broken records too."""
    num_turns, lost = 0, Counter[str]()
    for found in read_all(ASSETS / name):
        lost.update(found.lost)
        if isinstance(found, Broken):
            lost.update({} if found.lost else {found.reason: 1})
            continue
        assert find_problem(found.messages) is None
        num_turns += sum(message.role in ("user", "assistant", "tool") for message in found.messages)
    return num_turns, lost


def row(name: str) -> str:
    title, num_there = FILES[name]
    num_read, lost = count(name)
    losses = ", ".join(f"{num} {what}" for what, num in sorted(lost.items())) or "none"
    return f"| {title} | {num_there} | {num_read} | {losses} |"


@pytest.mark.parametrize("name", FILES)
def test_every_turn_of_a_file_is_read_or_lost_by_name(name):
    _, num_there = FILES[name]
    num_read, lost = count(name)
    num_named = sum(num for what, num in lost.items() if what.startswith(TURNS))
    assert num_read + num_named == num_there
    assert num_read > 0


def test_the_table_of_the_page_is_what_is_counted():
    assert {file.name for file in ASSETS.iterdir()} == set(FILES)
    text = DOCS.read_text()
    missing = [line for line in map(row, FILES) if line not in text]
    assert not missing, "\n".join(missing)


def messages_of(name: str, at: int = 0):
    found = read_all(ASSETS / name)[at]
    assert isinstance(found, Conversation)
    return found.messages


def test_blocks_of_one_reply_are_one_message_with_its_parallel_calls():
    reply = messages_of("claude_code.jsonl")[1]
    assert reply.content == "I look it up."
    assert reply.reasoning_content == "I look into the file."
    assert [call["function"]["name"] for call in reply.tool_calls or []] == ["Read", "Bash"]


def test_a_subagent_is_a_conversation_of_its_own():
    main, side = read_all(ASSETS / "claude_code.jsonl")
    assert "belts" not in str(main.messages)
    assert [message.content for message in side.messages][1] == "There are nine belts."


@pytest.mark.parametrize(
    ("name", "gone", "stays"),
    [
        ("claude_code.jsonl", "three big gears", "four small gears"),
        ("gemini_cli.jsonl", "Anohter", "Another one"),
        ("chatgpt.json", "100 degrees", "220 degrees"),
        ("claude_ai.json", "400.", "40,000"),
        ("open_webui.json", "An hour", "Two minutes"),
    ],
)
def test_the_branch_that_is_current_is_read(name, gone, stays):
    said = " ".join(message.content for message in messages_of(name))
    assert gone not in said
    assert stays in said


@pytest.mark.parametrize("name", ["swe_agent.traj", "mini_swe_agent.traj.json", "openhands.json"])
def test_output_of_an_agents_tools_is_not_the_users_words(name):
    assert sum(message.role == "user" for message in messages_of(name)) == 1
    assert any(message.role == "tool" for message in messages_of(name))


def test_what_answers_an_image_is_seen_and_not_learned(tmp_path):
    image = {"type": "image_url", "image_url": {"url": "x"}}
    turns = [
        user([image, {"type": "text", "text": "what?"}]),
        assistant("a cat"),
        user("2 + 2?"),
        assistant("4"),
    ]
    found = read_one(tmp_path, {"messages": turns})
    assert [message.weight for message in found.messages] == [None, 0, None, None]
    assert found.lost == {"image_url": 1, "answer to what is not text": 1}


def test_one_odd_message_costs_itself_and_its_answer_only(tmp_path):
    turns = [
        user("a"),
        assistant("b"),
        {"role": "user", "content": 7},
        assistant("seven"),
        user("c"),
        assistant("d"),
    ]
    found = read_one(tmp_path, {"messages": turns})
    assert [message.content for message in found.messages] == ["a", "b", "c", "d"]
    assert found.lost == {"wrong_type": 1, "answer or result of what was lost": 1}


def test_a_broken_line_of_a_session_costs_that_line_only(tmp_path):
    lines = (ASSETS / "claude_code.jsonl").read_bytes().splitlines()
    lines.insert(9, b'{"type": "assistant", "message": 5, "sessionId": "s-1"}')
    lines.insert(9, b"{half a li")
    found = read_all(write(tmp_path / "log.jsonl", *lines))
    assert [one.reason for one in found if isinstance(one, Broken)] == ["not_json", "wrong_type"]
    good = [one.messages for one in found if isinstance(one, Conversation)]
    assert good == [messages_of("claude_code.jsonl"), messages_of("claude_code.jsonl", 1)]


def test_a_session_and_records_may_share_a_file(tmp_path):
    lines = (ASSETS / "codex.jsonl").read_bytes().splitlines()
    found = read_all(write(tmp_path / "log.jsonl", *lines[:8], CHAT, *lines[8:]))
    assert [one.source.number for one in found] == [9, 1]
    assert found[1].messages == messages_of("codex.jsonl")


def test_a_file_of_a_message_a_line_is_one_conversation(tmp_path):
    lines = [user("a"), assistant("b"), {"role": "_mark", "content": ""}, user("c")]
    [found] = read_all(write(tmp_path / "log.jsonl", *lines))
    assert [message.content for message in found.messages] == ["a", "b", "c"]


def test_a_session_longer_than_memory_comes_in_pieces_that_share_turns(tmp_path):
    def line(i: int, kind: str, text: str) -> dict:
        message = {"role": kind, "content": text, "id": f"r{i}"}
        return {"type": kind, "sessionId": "s", "uuid": f"{kind}{i}", "message": message}

    lines = [line(i, kind, f"{kind} {i} " + "x" * 200) for i in range(200) for kind in ("user", "assistant")]
    pieces = read_all(write(tmp_path / "log.jsonl", *lines), limit=20_000)
    assert len(pieces) > 3
    asked = [[one.content.split()[1] for one in piece.messages if one.role == "user"] for piece in pieces]
    for before, after in itertools.pairwise(asked):
        assert before[-sessions.SHARED_PROMPTS :] == after[: sessions.SHARED_PROMPTS]
    assert sorted({int(number) for numbers in asked for number in numbers}) == list(range(200))


def test_an_answer_without_its_request_is_named():
    reasons = [one.reason for one in read_all(ASSETS / "batch.jsonl") if isinstance(one, Broken)]
    assert reasons == ["answer_only", "empty"]


def test_a_bad_answer_is_never_learned():
    assert [messages_of("kto.jsonl", at)[-1].weight for at in (0, 1)] == [None, 0]


def test_odd_values_of_any_field_end_in_a_name(tmp_path):
    """Whatever stands where a value is expected: read, or named; never an exception."""
    rng = random.Random(4)
    odd = [None, 3, "x", [], {}, [None], {"type": 5}, True, ["a", {"role": None}]]
    for name in FILES:
        text = (ASSETS / name).read_text()
        records = (
            [json.loads(line) for line in text.splitlines()] if name.endswith("jsonl") else [json.loads(text)]
        )
        for _ in range(60):
            changed = json.loads(json.dumps(records))
            place, key = rng.choice(list(_places(changed)))
            place[key] = rng.choice(odd)
            for found in read_all(write(tmp_path / "log.jsonl", *changed)):
                assert isinstance(found, Conversation) or found.message


def _places(value):
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(inner)
