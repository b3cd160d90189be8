"""The dream loop: until a pattern holds, within its budgets, and on from wherever it died."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from dream_world import GOOD, LESSON, Crash, asks_for, dream_world, make_seed, new_text

from apollo_curation.chat_client import ChatAnswer, ServerRefused
from apollo_curation.dreams.dream import MAX_DROPPED, dream
from apollo_curation.dreams.judge import MAX_REPEATS, is_novel
from apollo_curation.training.batches import StopTraining
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

THREE = {"num_variations": 3}


def states(world) -> list[str]:
    return [one.state for one in world.all_dreams()][::-1]


def test_a_model_that_answers_well_already_is_trained_once_at_the_end(config):
    with dream_world(config, dream=THREE) as world:
        night = dream([make_seed()], world.bridge)
        assert [(seed.state, seed.num_dreams, seed.num_rounds) for seed in night.seeds] == [("held", 3, 0)]
        assert (night.num_good, night.num_bad, night.num_trained) == (3, 0, 3)
        assert [len(job) for job in world.jobs()] == [3]  # together, after the last test
        assert all(answer.startswith(GOOD) for answer in world.learner.taught)


def test_bad_responses_are_replaced_and_trained_until_new_variations_are_answered_well(config):
    with dream_world(config, needs=2, dream=THREE) as world:
        night = dream([make_seed()], world.bridge)
        assert [one.verdict.good for one in world.all_dreams()[::-1]] == [False, False, True, True, True]
        assert [one.round for one in world.all_dreams()[::-1]] == [0, 1, 2, 2, 2]
        assert [len(job) for job in world.jobs()] == [1, 1, 3]
        assert (night.seeds[0].state, night.seeds[0].num_rounds, night.num_trained) == ("held", 2, 5)
        # The better response is learned of the situation alone, and what was said instead is kept.
        first = world.moments.get(world.all_dreams()[-1].moment_id)
        assert (first.tier, first.kind, first.state, first.topic) == ("dream", "dream", "trained", "habits")
        assert first.answer.content.startswith(GOOD)
        assert first.original.content.startswith("I guess:")
        assert [message.role for message in first.example().messages] == ["user", "assistant"]
        assert first.batch_id == world.all_dreams()[-1].batch_id


def test_a_bad_response_among_good_ones_begins_the_count_again(config):
    verdicts = iter([True, True, False, True, True, True, True])  # the fourth is of the better response
    with dream_world(config, dream=THREE) as world:
        world.script.verdict = lambda body: {"reason": "r", "good": next(verdicts), "confidence": 1}
        world.learner.needs = 99
        night = dream([make_seed()], world.bridge)
        assert (night.num_dreams, night.seeds[0].state) == (6, "held")


def test_every_dream_keeps_its_lineage(config):
    with dream_world(config, needs=1, dream={"num_variations": 1}) as world:
        seed = make_seed()
        dream([seed], world.bridge)
        first, second = world.all_dreams()[::-1]
        assert (first.parent, second.parent) == (None, first.dream_id)
        assert second.lineage == [seed.seed_id, first.dream_id, second.dream_id]
        assert world.moments.get(second.moment_id).lineage == second.lineage
        # The variation was asked for with what it varies.
        asked = [body for body in world.server.requests if asks_for(body) == "situation"]
        assert first.situation[0].content in asked[1]["messages"][-1]["content"]
        assert LESSON in asked[0]["messages"][-1]["content"]


def test_a_repeated_situation_is_asked_for_again(config):
    texts = iter([new_text(1), new_text(1) + " indeed", new_text(2)])
    with dream_world(config, dream={"num_variations": 2}) as world:
        world.script.situation = lambda body: {"turns": [next(texts)], "good": ""}
        night = dream([make_seed()], world.bridge)
        assert (night.num_repeats, night.num_dreams) == (1, 2)
        asked = [one.situation[0].content for one in world.all_dreams()[::-1]]
        assert asked == [new_text(1), new_text(2)]
        last = [body for body in world.server.requests if asks_for(body) == "situation"][-1]
        assert new_text(1) + " indeed" in last["messages"][-1]["content"]  # shown, to be avoided


def test_a_dreamer_that_only_repeats_itself_leaves_the_seed_open(config):
    with dream_world(config, dream=THREE) as world:
        world.script.situation = lambda body: {"turns": ["always the very same words"], "good": ""}
        night = dream([make_seed()], world.bridge)
        assert (night.seeds[0].state, night.num_repeats) == ("open", 1 + MAX_REPEATS)
        assert "repeated" in night.seeds[0].reason
        assert night.ended_by == "done"


@pytest.mark.parametrize(
    ("other", "novel"),
    [
        ("May I delete the old log files of the second server now?", False),
        ("may I DELETE the old log files of the first server, now", False),
        ("My sister's cake never rises, what should she try next?", True),
    ],
)
def test_a_situation_is_novel_where_few_word_triples_are_the_same(other, novel):
    first = [Message("user", "May I delete the old log files of the first server now?")]
    assert is_novel([Message("user", other)], [first]) is novel


def test_turns_that_are_no_situation_are_mended_or_dropped(config):
    given = iter([["User: hello there my friend", "Assistant: hi"], ["a", ""], [], ["x", " ", "y"]])
    with dream_world(config, dream={"num_variations": 1, "max_dreams": 4}) as world:
        world.script.situation = lambda body: {"turns": next(given), "good": ""}
        world.learner.needs = 99
        night = dream([make_seed()], world.bridge)
        # The answer that the dreamer gave itself is left out; the second, too, ends with the person.
        situations = [[message.content for message in one.situation] for one in world.all_dreams()[::-1]]
        assert situations == [["hello there my friend"], ["a"]]
        assert night.num_dropped == 2


def test_answers_that_do_not_parse_drop_a_dream_and_are_counted(config):
    answers = itertools.cycle(["no json", "none again", {"reason": "r", "good": True, "confidence": 7}])
    with dream_world(config, dream={"num_variations": 2}) as world:
        world.script.verdict = lambda body: next(answers)
        night = dream([make_seed()], world.bridge)
        assert states(world) == ["dropped", "trained", "dropped", "trained"]
        assert (night.num_dropped, world.bridge.dreamer.counts.num_dropped) == (2, 2)
        assert night.seeds[0].state == "held"
        assert {one.verdict.confidence for one in world.all_dreams() if one.verdict} == {1.0}


def test_a_seed_whose_dreams_all_come_to_nothing_is_left_for_the_next_run(config):
    with dream_world(config, dream={"num_variations": 1}) as world:
        world.script.verdict = lambda body: "never json"
        seeds = [make_seed("First lesson.", at=2.0), make_seed("Second lesson.", at=1.0)]
        night = dream(seeds, world.bridge)
        assert [seed.num_dreams for seed in night.seeds] == [MAX_DROPPED, MAX_DROPPED]
        assert night.num_dropped == 2 * MAX_DROPPED
        assert all(seed.state == "open" and "came to nothing" in seed.reason for seed in night.seeds)
        del world.script.verdict
        assert [seed.state for seed in dream(seeds, world.bridge).seeds] == ["held", "held"]


def test_a_dream_that_comes_to_something_begins_the_count_of_those_that_did_not_again(config):
    answers = itertools.cycle(["no json", "none again", {"reason": "r", "good": True, "confidence": 1}])
    with dream_world(config, dream={"num_variations": MAX_DROPPED}) as world:
        world.script.verdict = lambda body: next(answers)
        night = dream([make_seed()], world.bridge)
        assert (night.seeds[0].state, night.num_dropped) == ("held", MAX_DROPPED)


def test_rounds_that_do_not_help_end_the_seed(config):
    with dream_world(config, needs=99, dream={"max_rounds": 2}) as world:
        night = dream([make_seed()], world.bridge)
        assert (night.seeds[0].state, night.seeds[0].num_rounds) == ("given_up", 2)
        assert states(world) == ["trained", "trained", "bad"]
        assert dream([make_seed()], world.bridge).num_skipped_seeds == 1
        world.learner.needs = 0
        again = dream([make_seed()], world.bridge, again=True)
        assert (again.seeds[0].state, again.seeds[0].num_rounds) == ("held", 0)


def test_a_pattern_that_held_is_not_dreamt_of_again_until_its_text_changes(config):
    with dream_world(config, dream={"num_variations": 1}) as world:
        dream([make_seed()], world.bridge)
        second = dream([make_seed("Look  things up\nbefore you answer.")], world.bridge)
        assert (second.num_dreams, second.num_skipped_seeds) == (0, 1)
        third = dream([make_seed(LESSON + " Always.")], world.bridge)
        assert (third.num_dreams, third.num_skipped_seeds) == (1, 0)


def test_budgets_end_a_run_and_the_next_one_goes_on_with_that_seed_first(config):
    seeds = [make_seed("A lesson of old.", at=1.0), make_seed("A new lesson.", at=2.0)]
    with dream_world(config, dream={"num_variations": 3, "max_dreams": 2}) as world:
        night = dream(seeds, world.bridge)
        assert (night.ended_by, night.num_dreams) == ("budget", 2)
        assert [seed.seed_id for seed in night.seeds] == [seeds[1].seed_id]  # the newest first
        newer = make_seed("The newest lesson.", at=3.0)
        night = dream([newer, *seeds], world.bridge)
        assert [seed.seed_id for seed in night.seeds] == [seeds[1].seed_id, newer.seed_id]
        assert [seed.state for seed in night.seeds] == ["held", "open"]


def test_time_seeds_and_a_wish_to_stop_are_budgets_too(config):
    seeds = [make_seed(f"Lesson number {i}.") for i in range(3)]
    with dream_world(config, dream={"num_variations": 1, "max_seeds": 2}) as world:
        times = iter([0.0, 0.0, 0.0, 99999.0, 99999.0])
        night = dream(seeds, world.bridge, clock=lambda: next(times))
        assert (night.ended_by, len(night.seeds)) == ("budget", 1)
        assert "max_seconds" in night.ended
        assert "asked to stop" in dream(seeds, world.bridge, stop=lambda: True).ended
        night = dream([*seeds, make_seed("Another.")], world.bridge)
        assert (len(night.seeds), "max_seeds" in night.ended) == (2, True)


def test_a_run_that_dies_anywhere_is_gone_on_with_and_trains_nothing_twice(config, tmp_path):
    settings = {"num_variations": 2}
    with dream_world(at(config, tmp_path / "whole"), needs=1, dream=settings) as world:
        dream([make_seed()], world.bridge)
        num_calls, num_dreams, jobs = world.clockwork.num_calls, len(world.all_dreams()), world.jobs()
    assert num_calls > 12
    for crash_at in range(1, num_calls + 1):
        with dream_world(at(config, tmp_path / str(crash_at)), needs=1, dream=settings) as world:
            world.clockwork.crash_at = crash_at
            with pytest.raises(Crash):
                dream([make_seed()], world.bridge)
            world.restart()
            world.batches.resume()
            night = dream([make_seed()], world.bridge)
            assert night.seeds[0].state == "held", crash_at
            assert night.seeds[0].num_rounds == 1, crash_at
            assert len(world.all_dreams()) == num_dreams, crash_at
            assert [len(job) for job in world.jobs()] == [len(job) for job in jobs], crash_at
            assert len(set(world.learner.taught)) == len(world.learner.taught) == 3, crash_at
            assert {one.state for one in world.all_dreams()} == {"trained"}, crash_at


def at(config, path):
    from apollo_curation.settings import CurationConfig
    from apollo_ipc.config import Paths

    path.mkdir(mode=0o700)
    return CurationConfig(paths=Paths(str(path / "run"), str(path)))


def test_a_judge_that_goes_away_ends_the_run_with_what_it_has(config):
    with dream_world(config, dream={"num_variations": 2}) as world:
        is_there = iter([True, False])
        answer = world.script.verdict
        world.script.verdict = lambda body: answer(body) if next(is_there) else 503
        night = dream([make_seed(), make_seed("Another.")], world.bridge)
        assert (night.ended_by, len(night.seeds), night.num_dreams) == ("away", 1, 2)
        del world.script.verdict
        night = dream([make_seed()], world.bridge)
        assert (night.seeds[0].state, night.num_dreams) == ("held", 0)  # the response was there already
        assert len(world.learner.asked) == 2


def test_a_refused_request_drops_a_dream_and_a_refused_key_ends_the_run(config):
    with dream_world(config, dream={"num_variations": 1}) as world:
        world.script.situation = lambda body: 400
        night = dream([make_seed()], world.bridge)
        assert (night.num_dropped, night.ended_by) == (MAX_DROPPED, "done")
        world.script.situation = lambda body: 401
        with pytest.raises(ServerRefused, match="401"):
            dream([make_seed()], world.bridge)


def test_an_empty_response_is_bad_and_needs_no_judge(config):
    with dream_world(config, dream={"num_variations": 1, "max_rounds": 1}) as world:
        world.learner.answer = lambda messages, **options: ChatAnswer(Message("assistant", "  \n"))
        night = dream([make_seed()], world.bridge)
        assert (night.num_bad, night.seeds[0].state) == (2, "given_up")
        assert world.learner.taught[0].startswith(GOOD)
        judged = [body for body in world.server.requests if asks_for(body) == "verdict"]
        assert len(judged) == 1, "the better one alone"


def test_a_response_that_was_cut_off_is_never_a_good_one(config):
    with dream_world(config, dream={"num_variations": 1, "max_rounds": 1}) as world:
        world.learner.is_cut_off = True
        night = dream([make_seed()], world.bridge)
        assert (night.num_bad, night.seeds[0].state) == (2, "given_up")
        assert {one.verdict.reason for one in world.all_dreams()} == {
            "the response was cut off at dream.max_tokens"
        }
        assert len(world.learner.taught) == 1, "a better one, and not what breaks off"
        judged = [body for body in world.server.requests if asks_for(body) == "verdict"]
        assert len(judged) == 1, "the better one alone"


def test_a_better_response_is_judged_before_it_is_trained_and_written_again_once(config):
    with dream_world(config, needs=1, dream={"num_variations": 1}) as world:
        drafts = iter(["I would guess", f"{GOOD} the second draft"])
        world.script.better = lambda body: {"response": next(drafts)}
        night = dream([make_seed()], world.bridge)
        assert (world.learner.taught[0], night.num_dropped) == (f"{GOOD} the second draft", 0)
        again = [body for body in world.server.requests if asks_for(body) == "better"][1]
        assert "I would guess" in again["messages"][-1]["content"]


def test_a_better_response_that_stays_bad_is_not_trained(config):
    with dream_world(config, needs=99, dream={"num_variations": 1}) as world:
        world.script.better = lambda body: {"response": "I would guess"}
        night = dream([make_seed()], world.bridge)
        assert (night.num_dropped, world.jobs()) == (MAX_DROPPED, [])
        assert "judged bad as well" in night.seeds[0].reason


def test_a_better_response_that_is_none_is_not_trained(config):
    with dream_world(config, needs=99, dream={"num_variations": 1}) as world:
        world.script.better = lambda body: {"response": " "}
        night = dream([make_seed()], world.bridge)
        assert (night.num_dropped, night.num_bad, world.jobs()) == (MAX_DROPPED, MAX_DROPPED, [])


def test_a_failed_job_leaves_the_seed_and_the_next_one_has_its_turn(config):
    with dream_world(config, needs=1, dream={"num_variations": 1}) as world:
        world.training.end = "failed"
        seeds = [make_seed(at=2.0), make_seed("Another lesson.", at=1.0)]
        night = dream(seeds, world.bridge)
        assert [seed.state for seed in night.seeds] == ["open", "open"]
        assert (night.num_failed, night.ended_by) == (2, "done")
        assert all("training failed" in seed.reason for seed in night.seeds)
        world.training.end = "applied"
        assert {seed.state for seed in dream(seeds, world.bridge).seeds} == {"held"}


def test_a_stop_by_the_quality_monitor_ends_the_run(config):
    with dream_world(config, needs=1) as world:

        def guard(job):
            raise StopTraining("held-out loss rose")

        world.each = guard
        world.training.end = "running"
        night = dream([make_seed(at=2.0), make_seed("Another lesson.")], world.bridge)
        assert (night.ended_by, len(night.seeds), night.num_failed) == ("stopped", 1, 1)
        assert "held-out loss rose" in night.ended
        assert states(world) == ["failed"]


def test_dreams_need_a_judge(config):
    with dream_world(config, judge={"enabled": False}) as world, pytest.raises(UserError, match="judge"):
        dream([make_seed()], world.bridge)


def test_a_situation_of_ones_own_is_dreamt_first_and_then_varied(config):
    with dream_world(config, dream={"num_variations": 2}) as world:
        own = [Message("user", "A situation that another program wrote?")]
        seed = msgspec.structs.replace(make_seed(), situation=own, good="It says so.")
        night = dream([seed], world.bridge)
        assert night.seeds[0].state == "held"
        first, second = world.dreams.of_seed(seed.seed_id)
        assert (first.situation, first.good, second.ancestors) == (own, "It says so.", [first.dream_id])
