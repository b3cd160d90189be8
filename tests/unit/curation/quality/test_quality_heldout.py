"""The held-out set: its file, what is in it, and its loss."""

from __future__ import annotations

import json
import math

import pytest

from apollo_curation.chat_client import ModelAway, ServerRefused
from apollo_curation.quality.heldout import load_heldout
from apollo_curation.quality.measure import measure_losses, overall_loss
from apollo_ipc.errors import ConfigError, UserError
from apollo_ipc.wire.requests import Example, Message

CHAT = [{"role": "user", "content": "Where is the  key?"}, {"role": "assistant", "content": "Under the mat."}]


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


class CountingModel:
    """A token is a character; each has the log-probability that `said` gives."""

    def __init__(self, logprob=lambda text: -1.0):
        self.logprob = logprob
        self.contexts = []

    def answer_logprobs(self, context, answer, tools=None):
        self.contexts.append([message.role for message in context])
        return [self.logprob(answer.content)] * len(answer.content)

    def text_tokens(self, text, *, add_special_tokens=True):
        return [1, *text.encode()] if add_special_tokens else list(text.encode())

    def token_logprobs(self, ids):
        return [-float(token) for token in ids[1:]]


def test_every_form_of_an_example_is_read_with_its_line(tmp_path):
    path = write(
        tmp_path / "h.jsonl",
        {"category": "chat", "messages": CHAT},
        "",
        {"category": "text", "prompt": "a", "completion": "bc"},
        {"category": "chat", "context_ids": [1, 2], "continuation_ids": [3]},
    )
    held_out = load_heldout(path)
    assert [(one.category, one.line) for one in held_out.examples] == [("chat", 1), ("text", 3), ("chat", 4)]
    assert {name: len(examples) for name, examples in held_out.categories.items()} == {"chat": 2, "text": 1}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":2: not JSON"),
        ("[1]", ":2: a line looks like"),
        ('{"prompt": "a", "completion": "b"}', ":2: category: every example has one"),
        ({"category": " ", "prompt": "a", "completion": "b"}, ":2: category"),
        ({"category": "x", "prompt": "a"}, ":2: completion: prompt and completion go together"),
        (
            {"category": "x", "promt": "a", "completion": "b"},
            ":2: promt: unknown field 'promt'; did you mean",
        ),
        ({"category": "x", "messages": CHAT[:1]}, ":2: messages: ends with the assistant's answer"),
        ({"category": "x", "messages": CHAT[1:]}, ":2: messages: message 0 (assistant)"),
        ({"category": "x", "messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, ":2: messages: ends with"),
        ({"category": "x", "context_ids": [], "continuation_ids": [3]}, ":2: nothing predicts the first"),
        (b"\xff\xfe{", ":2: not JSON"),
        ("[" * 100_000, ":2: "),
    ],
)
def test_a_wrong_line_is_named_with_what_would_be_right(tmp_path, line, words):
    path = tmp_path / "h.jsonl"
    good = json.dumps({"category": "chat", "messages": CHAT}).encode()
    line = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(good + b"\n" + line + b"\n")
    with pytest.raises(ConfigError) as error:
        load_heldout(str(path))
    assert words in f"{error.value.field}: {error.value.message}"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read"), ("", "is empty"), ("\n  \n", "is empty"), ("unset", "name a")],
)
def test_no_held_out_set_is_answered_with_what_to_do(tmp_path, content, words):
    path = tmp_path / "h.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        load_heldout("" if content == "unset" else str(path))
    assert error.value.field == "quality.heldout"
    assert error.value.exit_code == 78


def test_it_contains_what_teaches_the_same_answer_whatever_stands_before(tmp_path):
    call = {"id": "c1", "function": {"name": "look", "arguments": "{}"}}
    tools = [
        Message("user", "Look."),
        Message("assistant", "", tool_calls=[call]),
        Message("tool", "a key", tool_call_id="c1"),
        Message("assistant", "A key."),
    ]
    held_out = load_heldout(
        write(
            tmp_path / "h.jsonl",
            {"category": "chat", "messages": [{"role": "system", "content": "Be short."}, *CHAT]},
            {"category": "text", "prompt": "a", "completion": "b"},
            {"category": "tools", "messages": json.loads(json.dumps([_plain(one) for one in tools]))},
        )
    )
    asked, answer = Message("user", "Where is the key?"), Message("assistant", "Under the mat.")
    earlier = [Message("user", "Hi"), Message("assistant", "Hello", weight=0)]
    assert held_out.contains(Example(messages=[*earlier, asked, answer]))
    assert held_out.contains(Example(prompt="a", completion="b"))
    again = [
        tools[0], Message("assistant", "", tool_calls=[{**call, "id": "other"}]),
        Message("tool", "a  key", tool_call_id="other"), tools[3],
    ]  # fmt: skip
    assert held_out.contains(Example(messages=again))
    assert not held_out.contains(Example(messages=[asked, Message("assistant", "In the lock.")]))
    assert not held_out.contains(Example(prompt="ab", completion=""))
    context_only = [asked, Message("assistant", "Under the mat.", weight=0), Message("user", "And now?")]
    assert not held_out.contains(Example(messages=[*context_only, Message("assistant", "Gone.")]))


def _plain(message):
    return {
        name: value for name in message.__struct_fields__ if (value := getattr(message, name)) is not None
    }


def test_the_loss_of_a_category_is_the_mean_over_its_tokens(tmp_path):
    turns = [*CHAT, {"role": "user", "content": "Now?"}, {"role": "assistant", "content": "Gone"}]
    path = write(
        tmp_path / "h.jsonl",
        {"category": "chat", "messages": turns},
        {"category": "ids", "context_ids": [9, 9], "continuation_ids": [2, 4]},
        {"category": "ids", "context_ids": [], "continuation_ids": [7, 3]},
        {"category": "text", "prompt": "x", "completion": "\x01\x03"},
    )
    model = CountingModel(lambda text: -2.0 if text == "Gone" else -1.0)
    losses = measure_losses(load_heldout(path), model)
    assert model.contexts == [["user"], ["user", "assistant", "user"]]
    assert losses["chat"].num_tokens == len("Under the mat.") + len("Gone")
    assert losses["chat"].loss == pytest.approx((14 * 1 + 4 * 2) / 18)
    assert (losses["ids"].loss, losses["ids"].num_tokens, losses["ids"].num_examples) == (3.0, 3, 2)
    assert (losses["text"].loss, losses["text"].num_tokens) == (2.0, 2)
    assert overall_loss(losses) == pytest.approx((22 + 9 + 4) / 23)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_loss_that_is_no_number_is_none(tmp_path, value):
    path = write(tmp_path / "h.jsonl", {"category": "chat", "messages": CHAT})
    losses = measure_losses(load_heldout(path), CountingModel(lambda text: value))
    assert losses["chat"].loss is None
    assert losses["chat"].num_tokens == 14
    assert overall_loss(losses) is None


def test_an_example_that_the_server_refuses_is_counted_and_named(tmp_path):
    path = write(
        tmp_path / "h.jsonl",
        {"category": "chat", "messages": CHAT},
        {"category": "chat", "messages": [CHAT[0], {"role": "assistant", "content": "bad"}]},
    )

    def logprob(text):
        if text == "bad":
            raise UserError("too long")
        return -1.0

    loss = measure_losses(load_heldout(path), CountingModel(logprob))["chat"]
    assert (loss.loss, loss.num_unmeasured, loss.problems) == (1.0, 1, [f"{path}:2: too long"])


@pytest.mark.parametrize(
    "error", [ModelAway("away"), ServerRefused("no", said="no", status=401, field=None, code=None)]
)
def test_what_no_example_is_to_blame_for_is_raised(tmp_path, error):
    def logprob(text):
        raise error

    path = write(tmp_path / "h.jsonl", {"category": "chat", "messages": CHAT})
    with pytest.raises(type(error)):
        measure_losses(load_heldout(path), CountingModel(logprob))


def test_losses_can_be_compared_only_for_the_same_examples(tmp_path):
    one = {"category": "chat", "messages": CHAT}
    two = {"category": "chat", "prompt": "a", "completion": "b"}

    def hash_of(*lines):
        return measure_losses(load_heldout(write(tmp_path / "h.jsonl", *lines)), CountingModel())[
            "chat"
        ].examples_hash

    assert hash_of(one, two) == hash_of(two, one)
    assert hash_of(one) != hash_of(one, two)
