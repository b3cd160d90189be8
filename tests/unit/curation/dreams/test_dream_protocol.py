"""Dream programs of other people: lines in, answers out, whatever stands in the lines."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from dream_world import GOOD, Crash, dream_world, make_seed
from places import SUPPORT
from test_dream import at, curate  # noqa: F401 (a fixture)

from apollo_curation.dreams.dream import dream
from apollo_curation.dreams.feed import Feed
from apollo_curation.dreams.protocol import encode
from apollo_curation.logs.strip import strip
from apollo_ipc.errors import UserError

HELLO = {"protocol": 1}
PROGRAM = SUPPORT / "dream_program.py"


def feed(world, *lines, has_dialogue=True, answers=None):
    """What is answered to lines (dicts, or bytes as they are) between the hello and `done`, and that."""
    data = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    answers = [] if answers is None else answers
    done = make_feed(world, lambda answer: answers.append(json.loads(encode(answer))), has_dialogue).run(
        io.BytesIO(data)
    )
    assert answers[0] == HELLO
    assert answers[-1] == json.loads(encode(done))
    return answers[1:-1], done


def make_feed(world, answer, has_dialogue=True) -> Feed:
    def without_instructions(conversation):
        stripped = strip(conversation, world.config.curation.strip)
        return stripped.conversation, stripped.problem

    return Feed(world.bridge, without_instructions, answer, path="program", has_dialogue=has_dialogue)


def situation(name: str, text: str = "", **more):
    messages = [{"role": "user", "content": text or f"What about {name}?"}]
    return {"type": "situation", "id": name, "messages": messages, **more}


def sample(text: str, **more):
    messages = [{"role": "user", "content": f"About {text}"}, {"role": "assistant", "content": text}]
    return {"type": "sample", "messages": messages, **more}


def test_a_dream_program_talks_to_the_bridge_until_its_pattern_holds(config):
    with dream_world(config, needs=2) as world:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, str(PROGRAM)], **pipes) as program:

            def answer(message):
                program.stdin.write(encode(message))
                program.stdin.flush()

            # The program keeps its end of the pipe open: its line `end` is what ends the stream.
            done = make_feed(world, answer).run(program.stdout)
            program.stdin.close()
            assert program.wait(20) == 0
        assert (done.num_situations, done.num_good, done.num_bad, done.num_trained) == (4, 2, 2, 4)
        assert [len(job) for job in world.jobs()] == [1, 1, 2]
        last = world.dreams.fed("lookup-3")
        assert [world.dreams.fed(f"lookup-{i}").dream_id for i in range(3)] == last.ancestors
        assert world.moments.get(last.moment_id).lineage == last.lineage
        assert (last.lesson, last.state, last.source.number) == ("Look things up.", "trained", 10)


def test_wrong_lines_are_answered_with_their_number_and_field_and_the_rest_goes_on(config):
    wrong = [
        (b"{not json\n", None, "not JSON"),
        (b'{"type": "situation", "id": "\xff"}\n', None, "not UTF-8"),
        (b"[1]\n", None, "one JSON object"),
        ({"type": "situatoin"}, "type", "did you mean 'situation'?"),
        ({"id": "a"}, "type", "situation, verdict, sample, train, end"),
        ({**situation("a"), "mesages": []}, "mesages", "did you mean 'messages'?"),
        ({"type": "situation", "id": "a"}, None, "missing required field `messages`"),
        ({**situation("a"), "id": 5}, "id", "Expected `str`"),
        ({**situation("a"), "messages": []}, "messages", "length >= 1"),
        ({**situation("a"), "messages": [{"role": "user"}]}, "messages[0]", "`content`"),
        ({**situation("a"), "messages": sample("x")["messages"]}, "messages", "ends with the user"),
        ({**sample("x"), "messages": situation("a")["messages"]}, "messages", "ends with the assistant"),
        (
            {**sample("x"), "messages": [{"role": "assistant", "content": "x"}]},
            "messages",
            "follows no user",
        ),
        (sample("  "), "messages", "empty: nothing to learn"),
        (situation("a", parent="nobody"), "id", "no situation 'nobody'"),
        ({"type": "verdict", "id": "nobody", "good": True}, "id", "no situation 'nobody'"),
        ({"type": "verdict", "id": "nobody", "good": "yes"}, "good", "Expected `bool`"),
        ({"type": "verdict", "id": "nobody", "good": False, "better": ""}, "better", "length >= 1"),
        ({"type": "verdict", "id": "nobody", "good": True, "confidence": 2}, "confidence", "<= 1"),
        ({"type": "train", "now": True}, "now", "unknown field"),
    ]
    with dream_world(config) as world:
        answers, done = feed(world, HELLO, b"\n", *(line for line, _, _ in wrong), sample("fine", id="f"))
        errors = [one for one in answers if one["type"] == "error"]
        assert [(one["line"], one["field"]) for one in errors] == [
            (number, field) for number, (_, field, _) in enumerate(wrong, 3)
        ]
        for one, (_, _, words) in zip(errors, wrong, strict=True):
            assert words in one["message"]
        assert (done.num_errors, done.num_trained, world.jobs()) == (len(wrong), 1, [["fine"]])


def test_a_line_longer_than_a_record_may_be_is_passed_over(config):
    with dream_world(config, curation={"patience_s": 0.0, "max_record_bytes": 300}) as world:
        answers, _ = feed(world, HELLO, sample("x" * 5000), sample("fine"))
        assert [one["type"] for one in answers] == ["error", "trained"]
        assert (answers[0]["line"], "300 bytes" in answers[0]["message"]) == (2, True)


@pytest.mark.parametrize("first", [{"protocol": 2}, sample("x"), b"\xef\xbb\xbfhello\n", {"protocol": None}])
def test_a_first_line_that_is_not_of_this_protocol_ends_the_stream(config, first):
    with dream_world(config) as world:
        answers = []
        with pytest.raises(UserError) as raised:
            feed(world, first, sample("x"), answers=answers)
        assert raised.value.field == "line 1"
        assert [one.get("type") for one in answers] == [None, "error", "done"]
        assert answers[-1]["ended_by"] == "refused"
        assert world.jobs() == []


def test_instructions_help_the_response_and_are_not_learned(config):
    with dream_world(config, needs=99) as world:
        told = situation("a", "Is it open?")
        told["messages"].insert(0, {"role": "system", "content": "Always look things up."})
        feed(world, HELLO, told, {"type": "verdict", "id": "a", "good": True})
        assert [message.role for message in world.learner.asked[0]] == ["system", "user"]
        (request,) = world.training.requests.values()
        assert [message.role for message in request.examples[0].messages] == ["user", "assistant"]
        assert request.examples[0].messages[1].content.startswith(GOOD)
        moment = world.moments.get(world.dreams.fed("a").moment_id)
        assert len(moment.stripped) == 1
        only = {**told, "id": "b", "messages": told["messages"][:1]}
        assert feed(world, HELLO, only)[0][0]["field"] == "messages"


def test_the_verdict_can_be_left_to_our_judge_at_once_or_at_the_end(config):
    with dream_world(config, needs=1) as world:
        answers, done = feed(
            world,
            HELLO,
            situation("now", lesson="Look it up.", judge=True),
            {"type": "train"},
            situation("later", lesson="Look it up."),
            sample("between"),
        )
        kinds = [(one["type"], one["id"][:6]) for one in answers]
        assert kinds == [
            ("response", "now"),
            ("verdict", "now"),
            ("trained", "now"),
            ("response", "later"),
            ("verdict", "later"),
            ("trained", "sample"),
            ("trained", "later"),
        ]
        assert (answers[1]["good"], answers[1]["better"].startswith(GOOD)) == (False, True)
        assert (answers[4]["good"], answers[4]["better"], done.num_good, done.num_bad) == (True, None, 1, 1)
        assert answers[2]["job_id"] == f"job-{answers[2]['batch_id']}"
        assert answers[2]["weight_version"] == 7


def test_a_bad_verdict_without_a_better_response_gets_one_from_our_dreamer(config):
    with dream_world(config, needs=99) as world:
        bad = {"type": "verdict", "id": "a", "good": False, "reason": "it guesses"}
        feed(world, HELLO, situation("a"), bad)
        assert world.jobs() == [[f"{GOOD} user: What about a?"]]
        assert "it guesses" in world.server.requests[-1]["messages"][-1]["content"]


def test_a_program_cannot_call_a_response_good_that_was_cut_off(config):
    with dream_world(config) as world:
        world.learner.is_cut_off = True
        verdict = {"type": "verdict", "id": "a", "good": True}
        answers, _ = feed(world, HELLO, situation("a"), verdict, {**verdict, "good": False, "better": "No."})
        (error,) = (one for one in answers if one["type"] == "error")
        assert (error["line"], error["field"]) == (3, "good")
        assert "cut off at dream.max_tokens" in error["message"]
        assert world.jobs() == [["No."]]


def test_without_a_judge_the_program_must_judge(config):
    with dream_world(config, needs=99, judge={"enabled": False}) as world:
        bad = {"type": "verdict", "id": "a", "good": False}
        answers, done = feed(world, HELLO, situation("a"), bad, situation("b"))
        assert [(one["type"], one["id"]) for one in answers] == [
            ("response", "a"),
            ("error", "a"),
            ("response", "b"),
            ("error", "a"),
            ("error", "b"),
        ]
        assert (answers[1]["field"], done.num_unjudged, world.server.requests) == ("better", 2, [])


def test_samples_are_trained_in_batches_of_the_tiers_size(config):
    with dream_world(config, tier_dream={"max_examples": 2}) as world:
        _, done = feed(world, HELLO, *(sample(f"text {i}") for i in range(5)))
        assert world.jobs() == [["text 0", "text 1"], ["text 2", "text 3"], ["text 4"]]
        assert (done.num_samples, done.num_trained) == (5, 5)


def test_a_program_that_sends_its_lines_again_gets_the_same_and_trains_nothing_twice(config):
    lines = [HELLO, situation("a", judge=True), situation("b"), sample("text"), sample("named", id="c")]
    lines.append({"type": "verdict", "id": "b", "good": True})
    with dream_world(config, needs=1) as world:
        first, _ = feed(world, *lines)
        second, _ = feed(world, *lines)
        assert len(world.learner.asked) == 2
        assert sum(len(job) for job in world.jobs()) == 4

        def told(answers, kind):
            return sorted(
                (one["id"], one.get("message", {}).get("content"), one.get("batch_id"))
                for one in answers
                if one["type"] == kind
            )

        assert told(first, "response") == told(second, "response")
        assert set(told(first, "trained")) == set(told(second, "trained"))
        assert not told(second, "error")
        other = [situation("a", "Another?"), sample("other", id="c"), sample("text", id="b")]
        other.append({"type": "verdict", "id": "b", "good": False})
        third, _ = feed(world, HELLO, *other)
        assert [one["field"] for one in third] == ["id", "id", "id", "good"]


def test_a_feed_that_dies_anywhere_can_be_fed_again(config, tmp_path):
    lines = [HELLO, situation("a", judge=True), {"type": "train"}, situation("b"), sample("text")]
    with dream_world(at(config, tmp_path / "whole"), needs=1) as world:
        feed(world, *lines)
        num_calls, taught = world.clockwork.num_calls, world.learner.taught
    assert num_calls > 8
    for crash_at in range(1, num_calls + 1):
        with dream_world(at(config, tmp_path / str(crash_at)), needs=1) as world:
            world.clockwork.crash_at = crash_at
            with pytest.raises(Crash):
                feed(world, *lines)
            world.restart()
            world.batches.resume()
            feed(world, *lines)
            assert sorted(world.learner.taught) == sorted(taught), crash_at
            assert {one.state for one in world.dreams.list()} == {"trained"}, crash_at


def test_what_was_collected_when_the_judge_went_away_is_trained_by_the_next_run(config):
    with dream_world(config, needs=1) as world:
        world.script.verdict = lambda body: 503
        answers, done = feed(world, HELLO, sample("text"), situation("a", judge=True), sample("never read"))
        assert (done.ended_by, answers[-1]["type"], world.jobs()) == ("away", "error", [])
        del world.script.verdict
        answers, done = feed(world, HELLO)
        assert (done.num_trained, world.jobs()) == (1, [["text"]])


def test_a_situation_that_was_dropped_is_tried_again_when_it_is_sent_again(config):
    with dream_world(config, needs=99) as world:
        world.script.verdict = lambda body: "no json"
        answers, done = feed(world, HELLO, situation("a", judge=True))
        assert (answers[-1]["id"], "dropped" in answers[-1]["message"], done.num_dropped) == ("a", True, 1)
        del world.script.verdict
        done = feed(world, HELLO, situation("a", judge=True))[1]
        assert (done.num_bad, done.num_trained, len(world.learner.asked)) == (1, 1, 1)


def test_failed_training_is_answered_for_each_of_its_dreams(config):
    with dream_world(config) as world:
        world.training.end = "failed"
        answers, done = feed(world, HELLO, sample("one", id="a"), sample("two", id="b"))
        assert [(one["type"], one["id"]) for one in answers] == [("error", "a"), ("error", "b")]
        assert (done.num_failed, "as told" in answers[0]["message"]) == (2, True)


def test_a_fed_dream_can_name_one_of_our_seeds_and_does_not_count_in_our_loop(config):
    with dream_world(config, dream={"num_variations": 2, "max_dreams": 1}) as world:
        seed = make_seed()
        dream([seed], world.bridge)
        feed(world, HELLO, situation("a", seed=seed.seed_id, judge=True))
        fed = world.dreams.fed("a")
        assert (fed.seed_id, fed.lesson, fed.topic) == (seed.seed_id, seed.text, "habits")
        night = dream([seed], world.bridge)
        assert (night.num_dreams, night.seeds[0].state) == (1, "held")


def test_a_file_is_fed_without_verdicts_and_its_answers_go_to_a_result_file(
    environment,
    config,
    curate,  # noqa: F811
    tmp_path,
):
    verdict = {"type": "verdict", "id": "a", "good": True}
    lines = [HELLO, situation("a", lesson="Look it up."), verdict, sample("text")]
    file, out = tmp_path / "dreams.jsonl", tmp_path / "result.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with dream_world(config, needs=1) as world:
        done = curate(world, "feed", file, "--out", out)
        assert (done.exit_code, "1 situations and 1 samples" in done.stdout) == (0, True), done.output
        answers = [json.loads(line) for line in out.read_text().splitlines()]
        assert [one.get("type") for one in answers] == [
            None, "response", "error", "verdict", "trained", "trained", "done"
        ]  # fmt: skip
        assert "cannot have seen the response" in answers[2]["message"]
        assert json.loads(curate(world, "feed", file, "--json").stdout)["num_situations"] == 1


def test_standard_input_and_output_are_the_protocol(environment, config, curate):  # noqa: F811
    with dream_world(config) as world:
        lines = [HELLO, situation("a"), {"type": "verdict", "id": "a", "good": True}]
        done = curate(world, "feed", "-", stdin="\n".join(json.dumps(line) for line in lines))
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [one.get("type") for one in answers] == [None, "response", "trained", "done"]
        assert (answers[-1]["num_trained"], answers[-1]["ended_by"], done.exit_code) == (1, "input", 0)
        assert isinstance(curate(world, "feed", "-", "--json", stdin="").exception, UserError)
        assert isinstance(curate(world, "feed", "nowhere.jsonl").exception, UserError)
