"""Stripping: what each rule takes, what goes with it, and that the rest is always a conversation."""

from __future__ import annotations

import json
import random
import re

import pytest
from rich.console import Console

from apollo_curation.logs.conversation import Conversation, Origin, find_problem, text_hash
from apollo_curation.logs.mend import mend
from apollo_curation.logs.strip import NESTED, STRAY, UNCLOSED, Removed, describe, strip
from apollo_curation.logs.strip_report import StripTally, diff_lines, estimate_tokens, print_diff
from apollo_curation.moments.segments import Segments
from apollo_curation.settings import StripRule
from apollo_ipc.wire.requests import Message

MARKS = StripRule(begin="<m>", end="</m>")
SYSTEM = StripRule(role="system")
RECALL = StripRule(pattern=r"^\[recalled\].*")


def of(*messages: Message) -> Conversation:
    assert find_problem(list(messages)) is None
    return Conversation(list(messages), Origin("log.jsonl", 1, 0), "topic")


def user(text: str) -> Message:
    return Message("user", text)


def said(text: str, *ids: str, arguments: str = "{}") -> Message:
    calls = [
        {"type": "function", "id": one, "function": {"name": "f", "arguments": arguments}} for one in ids
    ]
    return Message("assistant", text, tool_calls=calls or None)


def result(call_id: str | None, text: str) -> Message:
    return Message("tool", text, tool_call_id=call_id)


def contents(*messages: Message, rules=(MARKS,)) -> list[str]:
    """The contents that are left; a valid conversation, in which stripping finds nothing more."""
    stripped = strip(of(*messages), list(rules))
    assert stripped.problem is None
    assert find_problem(stripped.conversation.messages) is None
    assert strip(stripped.conversation, list(rules)).removed == []
    return [message.content for message in stripped.conversation.messages]


def test_whole_messages_go_by_role():
    messages = [Message("system", "s"), Message("developer", "d"), user("a"), said("b")]
    assert contents(*messages, rules=[SYSTEM]) == ["d", "a", "b"]


def test_a_conversation_that_no_rule_touches_stays_as_it_is():
    conversation = of(Message("developer", "d"), user("a"), said("  b\n\n\n c "))
    stripped = strip(conversation, [SYSTEM, MARKS, RECALL])
    assert stripped.conversation is conversation
    assert (stripped.removed, stripped.problem) == ([], None)


@pytest.mark.parametrize(
    ("text", "rest", "notes"),
    [
        ("<m>memory</m>\n\nhello", "hello", {""}),
        ("hello\n\n<m>memory</m>\n\nthere", "hello\n\nthere", {""}),
        ("a <m>x</m> b <m>y</m> c", "a  b  c", {""}),
        ("hello\n<m>x</m>", "hello", {""}),
        ("a <m>x<m>y</m>z</m> b", "a  b", {NESTED}),
        ("a <m>x", "a", {UNCLOSED}),
        ("a <m>x<m>y</m> z", "a", {UNCLOSED}),
        (" <m>x</m>  a b  ", "a b  ", {""}),
        ("a </m> b", "a  b", {STRAY}),
        ("a <<m>x</m>m>y</m> b", "a  b", {""}),  # what is left after the first cut is a pair again
    ],
)
def test_markers_are_taken_with_what_is_between_them(text, rest, notes):
    assert contents(user(text), said("ok")) == [rest, "ok"]
    removed = strip(of(user(text), said("ok")), [MARKS]).removed
    assert {part.note for part in removed} == notes


def test_equal_markers_are_taken_in_pairs():
    rule = StripRule(begin="***", end="***")
    assert contents(user("a***b***c***d***e"), said("ok"), rules=[rule]) == ["ace", "ok"]


def test_a_marker_inside_the_answer_its_thought_and_its_calls_is_taken():
    arguments = json.dumps({"q": "x<m>secret</m>", "list": [{"deep": "<m>secret</m>é"}], "n": 1})
    answer = Message(
        "assistant",
        "as <m>my memory says</m>you like",
        reasoning_content="<m>thought</m>",
        tool_calls=said("", "a", arguments=arguments).tool_calls,
    )
    stripped = strip(of(user("q"), answer), [MARKS])
    [_, left] = stripped.conversation.messages
    assert left.content == "as you like"
    assert left.reasoning_content is None
    assert left.tool_calls is not None
    assert json.loads(left.tool_calls[0]["function"]["arguments"]) == {
        "q": "x",
        "list": [{"deep": "é"}],
        "n": 1,
    }
    assert len(stripped.removed) == 4


def test_arguments_that_are_no_json_are_stripped_as_text():
    left = strip(of(user("q"), said("", "a", arguments="{<m>x</m>")), [MARKS]).conversation.messages[1]
    assert left.tool_calls is not None
    assert left.tool_calls[0]["function"]["arguments"] == "{"


def test_a_pattern_reaches_over_lines_and_an_empty_match_takes_nothing():
    assert contents(
        user("keep\n# Memory\nsecret\nmore"), said("b"), rules=[StripRule(pattern="# Memory.*")]
    ) == [
        "keep",
        "b",
    ]
    assert contents(user("ab"), said("b"), rules=[StripRule(pattern="(?=b)")]) == ["ab", "b"]


def test_hashes_of_all_that_went_are_kept_with_those_from_before():
    conversation = of(Message("system", "be kind"), user("a <m>x</m>"), said("b"))
    stripped = strip(conversation, [SYSTEM, MARKS])
    assert stripped.conversation.removed == [text_hash("be kind"), text_hash("<m>x</m>")]
    assert [part.rule for part in stripped.removed] == [0, 1]
    again = strip(stripped.conversation, [StripRule(pattern="b")])
    assert again.conversation.removed[:2] == stripped.conversation.removed


def test_a_question_that_goes_takes_its_answer_along():
    turns = [user("<m>x</m>"), said("1", "a"), result("a", "2"), said("3"), user("q"), said("4")]
    assert contents(*turns) == ["q", "4"]
    assert contents(user("p"), said("0"), *turns) == ["p", "0", "q", "4"]


def test_a_reminder_behind_tool_results_goes_alone():
    turns = [user("q"), said("", "a"), result("a", "1"), user("<m>remember</m>"), said("2")]
    assert contents(*turns) == ["q", "", "1", "2"]


def test_an_answer_that_goes_takes_its_question_along_unless_it_was_the_last():
    assert contents(user("a"), said("<m>x</m>"), user("b"), said("c")) == ["b", "c"]
    assert contents(user("a"), said("b"), user("c"), said("<m>x</m>")) == ["a", "b", "c"]
    assert contents(user("a"), said("", "i"), result("i", "1"), said("<m>x</m>"), user("b")) == [
        "a",
        "",
        "1",
        "b",
    ]


def test_a_result_that_goes_takes_its_call_along_and_leaves_the_others():
    turns = [user("q"), said("", "a", "b"), result("a", "[recalled] x"), result("b", "2"), said("3")]
    stripped = strip(of(*turns), [RECALL])
    assert [len(message.tool_calls or []) for message in stripped.conversation.messages] == [0, 1, 0, 0]
    assert stripped.problem is None
    assert contents(user("q"), said("", "a"), result("a", "[recalled] x"), said("3"), rules=[RECALL]) == [
        "q",
        "3",
    ]


def test_a_text_before_calls_that_went_goes_too_when_the_turn_has_more_to_say():
    turns = [user("q"), said("let me recall", "a"), result("a", "[recalled] x")]
    assert contents(*turns, said("3"), rules=[RECALL]) == ["q", "3"]
    assert contents(*turns, rules=[RECALL]) == ["q", "let me recall"]


def test_nothing_left_is_said():
    stripped = strip(of(Message("system", "s")), [SYSTEM])
    assert stripped.problem == "nothing is left of it"
    assert strip(of(user("<m>a</m>"), said("b")), [MARKS]).problem == "nothing is left of it"


def test_a_conversation_that_was_invalid_before_is_refused():
    wrong = Conversation([said("b")], Origin("x", 1, 0), "t")
    assert strip(wrong, [MARKS]).problem == find_problem(wrong.messages)


def test_faults_that_stripping_did_not_make_are_left_alone():
    messages = [user("a"), user("b"), said("c"), user("d"), said("e")]
    assert mend(messages, [3])[0] == messages[:3]


def random_conversation(rng: random.Random) -> list[Message]:
    """Any shape that find_problem allows, with markers and recalled text strewn in."""

    def text() -> str:
        pieces = ["<m>", "</m>", "word", "\n", "two words", "[recalled] x"]
        kind = rng.random()
        if kind < 0.15:
            return "<m>all of it</m>"
        if kind < 0.25:
            return "[recalled] only"
        return " ".join(rng.choice(pieces) for _ in range(rng.randint(0, 5)))

    messages = [Message(rng.choice(["system", "developer"]), text()) for _ in range(rng.randint(0, 2))]
    number = 0
    for _ in range(rng.randint(0, 4)):
        messages.append(user(text()))
        if rng.random() < 0.1:
            return messages
        is_open = False
        while rng.random() < 0.5:
            ids = [f"c{number + n}" for n in range(rng.randint(1, 3))]
            number += len(ids)
            has_ids = rng.random() < 0.7
            message = said(text(), *ids, arguments=rng.choice(["{}", json.dumps({"q": text()}), text()]))
            if not has_ids:
                for call in message.tool_calls or []:
                    del call["id"]
            messages.append(message)
            if rng.random() < 0.05:
                return messages
            rng.shuffle(ids)
            messages += [result(one if has_ids else None, text()) for one in ids]
            is_open = rng.random() < 0.2
            if is_open:
                break
        if not is_open:
            messages.append(said(text()))
    return messages


def test_no_random_conversation_becomes_invalid_and_nothing_marked_stays():
    rng = random.Random(20)
    rules = [SYSTEM, MARKS, RECALL, StripRule(pattern="two words")]
    num_changed = num_shorter = 0
    for _ in range(3000):
        messages = random_conversation(rng)
        assert find_problem(messages) is None
        before = Conversation(messages, Origin("x", 1, 0), "t")
        chosen = rng.sample(rules, rng.randint(1, len(rules)))
        stripped = strip(before, chosen)
        left = stripped.conversation.messages
        if stripped.problem is not None:
            assert not left
            continue
        assert find_problem(left) is None
        num_changed += bool(stripped.removed)
        num_shorter += len(left) < len(messages)
        everything = json.dumps([[one.content, one.tool_calls] for one in left])
        if MARKS in chosen:
            assert "<m>" not in everything
        if SYSTEM in chosen:
            assert all(message.role != "system" for message in left)
        if RECALL in chosen:
            assert not any(message.content.startswith("[recalled]") for message in left)
        assert len(stripped.conversation.removed) == len(stripped.removed)
        assert strip(stripped.conversation, chosen).removed == []
    assert num_changed > 1000
    assert num_shorter > 500


def test_taking_out_any_messages_at_random_leaves_a_conversation():
    rng = random.Random(21)
    for _ in range(3000):
        messages = random_conversation(rng)
        gone = [i for i in range(len(messages)) if rng.random() < 0.25]
        left, dropped = mend(messages, gone)
        assert find_problem(left) is None, (messages, gone)
        assert not {id(messages[i]) for i in gone} & {id(message) for message in left}
        if not gone:
            assert (left, dropped) == (messages, [])


def test_the_segment_before_a_decision_is_short_and_valid():
    rng = random.Random(22)
    num_full = 0
    for _ in range(2000):
        messages = random_conversation(rng)
        decisions = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for at in decisions:
            num_messages = rng.randint(1, 9)
            found = Segments(messages, num_messages).before(at)
            assert find_problem([*found, messages[at]]) is None
            assert found[-1] is messages[at - 1]
            turns = [message for message in found if message.role not in ("system", "developer")]
            assert turns[0].role == "user"
            last_call = max((i for i in range(at) if messages[i].role == "assistant"), default=at)
            assert len(turns) <= max(num_messages, 1 + at - last_call)
            num_full += len(turns) == num_messages
    assert num_full > 300


def test_a_long_chain_of_calls_keeps_its_question_and_the_latest_calls():
    turns = [user("q"), *(one for n in "abcd" for one in (said("", n), result(n, n))), said("done")]
    found = Segments([Message("system", "s"), *turns], 5).before(10)
    assert [message.content for message in found] == ["s", "q", "", "c", "", "d"]
    assert Segments(turns, 1).before(9) == [turns[0], *turns[7:9]]
    assert Segments([user("p"), said("x"), *turns], 11).before(11)[0].content == "p"


def test_the_report_says_the_share_of_each_rule():
    tally = StripTally([SYSTEM, MARKS], count_tokens=len)
    before = of(Message("system", "12345"), user("abc<m>x</m>"), said("de"))
    tally.add(strip(before, [SYSTEM, MARKS]), [Removed(None, "1234567890")])
    tally.add(strip(of(user("abcde"), said("fghij")), [SYSTEM, MARKS]), [])
    tally.add(strip(of(user("<m>"), said("1")), [SYSTEM, MARKS]), [])
    report = tally.report()
    assert [(rule.rule, rule.num_parts, rule.num_tokens) for rule in report.rules] == [
        ("role system", 1, 5),
        ("<m> ... </m>", 2, 11),
        ("went with what was stripped", 2, 11),
    ]
    assert (report.num_tokens, report.num_removed_tokens) == (42, 27)
    assert report.share == 27 / 42
    assert (report.num_conversations, report.num_changed, report.num_refused) == (3, 1, 1)
    assert report.problems == {"nothing is left of it": 1}
    assert report.notes[UNCLOSED] == 1
    assert not report.is_estimate
    assert StripTally([SYSTEM]).report().is_estimate
    assert estimate_tokens("Hello, world!") == 4


def test_each_rule_is_described_as_it_was_written():
    rules = [SYSTEM, MARKS, RECALL, StripRule(json_path="$.memory")]
    texts = ["role system", "<m> ... </m>", "pattern ^\\[recalled\\].*", "json_path $.memory"]
    assert [describe(rule) for rule in rules] == texts


def test_the_preview_shows_what_went_and_lets_no_control_sequence_through():
    before = of(Message("system", "secret"), user("a\x1b[2Jb\u202e <m>x</m>c"), said("d"))
    stripped = strip(before, [SYSTEM, MARKS])
    lines = list(diff_lines(before, stripped, [Removed(0, "raw part")]))
    assert "-secret" in lines
    assert "-raw part" in lines
    assert "-a\\u001b[2Jb\\u202e <m>x</m>c" in lines
    assert "+a\\u001b[2Jb\\u202e c" in lines
    assert " [user]" in lines
    assert not any(re.search(r"[\x00-\x1f\x7f\u202e]", line) for line in lines)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_preview_is_coloured_on_a_terminal_only(is_terminal):
    before = of(Message("system", "secret [bold]text[/bold]"), user("a"), said("d"))
    environ = {"TERM": "xterm-256color"}
    console = Console(force_terminal=is_terminal, markup=False, highlight=False, _environ=environ)
    with console.capture() as captured:
        print_diff(console, before, strip(before, [SYSTEM]), [])
    text = captured.get()
    assert ("\x1b[31m-secret [bold]text[/bold]" in text) == is_terminal
    assert "-secret [bold]text[/bold]" in text
    assert ("\x1b" in text) == is_terminal


def test_the_preview_of_a_refused_conversation_says_why():
    before = of(Message("system", "s"))
    assert (
        list(diff_lines(before, strip(before, [SYSTEM]), []))[-1] == "! cannot be used: nothing is left of it"
    )
