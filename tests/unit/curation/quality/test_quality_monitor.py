"""When the guard beside training finds a breach, what it stops, and what is no breach."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from quality_night import night_in

from apollo_curation.quality.history import QualityHistory
from apollo_ipc.errors import ConfigError, UserError
from apollo_ipc.wire.requests import Message


@pytest.fixture
def night(tmp_path):
    with night_in(tmp_path) as night:
        yield night


def test_a_good_night_is_measured_before_during_and_after(night):
    assert night.monitor.before().may_go_on
    batch = night.train(*["fine"] * 6)
    report = night.monitor.after()
    assert batch.state == "trained"
    assert report.ok
    assert report.may_go_on
    assert night.labels() == ["before", "during", "during", "after"]
    first, *_, last = QualityHistory(night.store).list()
    assert first.durable_version == 0
    assert (first.weight_version, last.weight_version) == (0, 6)
    assert last.batch_ids == [batch.batch_id]
    assert last.losses["facts"].loss == 1.0
    assert last.loss == 1.5
    assert [(one.name, one.passed) for one in last.canaries] == [("capital", True), ("kind", True)]
    assert night.server.restores == []
    assert batch.job.loss_history == pytest.approx([3.0, 2.9, 2.8, 2.7, 2.6, 2.5])


def test_poison_in_a_long_job_stops_it_on_the_way_and_nothing_more_is_trained(night):
    night.monitor.before()
    batch = night.train(*["poison"] * 40)
    assert batch.state == "stopped"
    assert batch.job.steps_done < 10
    assert "facts: held-out loss 1.0000 -> " in batch.error
    report = night.monitor.after()
    assert not report.ok
    assert not report.may_go_on
    assert [breach.what for breach in report.breaches] == ["facts"]
    assert night.server.restores == []
    during = [one for one in QualityHistory(night.store).list() if one.label == "during"]
    assert [one.action for one in during] == ["stopped"]
    # The next night begins with the same finding: it trains nothing, and makes this no new reference.
    again = night.watch()
    syncs = night.server.num_syncs
    report = again.before()
    assert not report.may_go_on
    assert again.baseline is None
    assert report.against.label == "before"
    assert night.server.num_syncs == syncs + 1


def test_small_losses_that_add_up_in_a_night_are_a_breach(night):
    night.server.effects["creep"] = night.server.creep
    night.monitor.before()
    night.train("creep")
    assert night.monitor.after().ok
    night.train("creep")
    assert not night.monitor.after().ok


def test_what_creeps_from_night_to_night_is_reported_as_drift(night, caplog):
    night.server.effects["creep"] = night.server.creep
    for _ in range(3):
        night.monitor.before()
        night.train("creep")
        report = night.monitor.after()
        assert report.ok
    assert report.drift == {"chat": 0.0, "facts": pytest.approx(1.03**3 - 1)}
    assert "the loss of facts is 9.3 % higher than when it was first measured" in caplog.text


def test_a_loss_that_is_no_number_is_a_breach_whatever_was_before(night):
    night.server.losses["chat"] = math.nan
    report = night.monitor.before()
    assert [breach.kind for breach in report.breaches] == ["not_a_number"]
    assert not report.may_go_on
    assert QualityHistory(night.store).list()[0].losses["chat"].loss is None
    assert night.monitor.baseline is None


def test_an_example_that_can_no_longer_be_measured_is_a_breach(night):
    night.monitor.before()
    answered = night.server.answer_logprobs

    def answer(context, answer, tools=None):
        if answer.content == "chat":
            raise UserError("the server answered 500: out of range float values")
        return answered(context, answer)

    night.server.answer_logprobs = answer
    report = night.monitor.after()
    assert [breach.kind for breach in report.breaches] == ["unmeasured"]
    assert "heldout.jsonl:1: the server answered 500" in report.breaches[0].sentence


def test_a_canary_that_is_lost_is_a_breach_unless_one_may_be(night):
    night.server.effects["forget"] = lambda: setattr(night.server, "knows_paris", False)
    night.monitor.before()
    night.train("forget")
    report = night.monitor.after()
    assert [breach.sentence for breach in report.breaches] == [
        "1 of the canaries that passed before fail now, at most 0 may: capital"
    ]
    night.server.knows_paris = True
    night.change(max_canaries_lost=1)
    night.monitor.before()
    night.train("forget")
    assert night.monitor.after().ok


def test_a_judge_that_is_down_is_counted_and_no_breach(night):
    night.monitor.before()
    night.judge.is_down = True
    night.train("fine")
    report = night.monitor.after()
    assert report.ok
    assert report.measurement.num_not_judged == 1


def test_noise_is_no_breach(night):
    night.server.losses["facts"] = 0.0001
    night.server.effects["noise"] = lambda: night.server.losses.update(facts=0.004, chat=2.02)
    night.monitor.before()
    night.train("noise")
    assert night.monitor.after().ok


def test_a_server_that_is_away_during_a_job_costs_a_check_and_not_the_job(night, caplog):
    night.monitor.before()
    night.server.effects["away"] = lambda: setattr(night.server, "is_away", True)
    night.server.effects["back"] = lambda: setattr(night.server, "is_away", False)
    batch = night.train("away", *["fine"] * 6, "back", "fine")
    assert batch.state == "trained"
    assert "no check during job" in caplog.text
    assert night.monitor.after().ok


def test_a_check_is_held_against_the_last_good_one_until_it_is_accepted(night):
    assert night.monitor.check().against is None
    night.server.poison()
    assert not night.monitor.check().ok
    assert not night.monitor.check().ok
    assert not night.monitor.check("good").ok
    report = night.monitor.check()
    assert report.ok
    assert report.against.label == "good"


def test_moments_of_the_held_out_set_are_named(night, caplog):
    added = night.add("fine")
    held = msgspec.structs.replace(added[0], context=[Message("user", "held facts")], moment_id="")
    held = msgspec.structs.replace(held, answer=Message("assistant", "facts"))
    known = night.moments.add([held])
    assert night.monitor.find_overlap([*added, held]) == [held]
    assert night.monitor.before().overlap == [known[0].moment_id]
    assert "1 moments are in the held-out set" in caplog.text


def test_an_empty_held_out_set_is_refused_before_anything_is_trained(night, tmp_path):
    (tmp_path / "heldout.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty, so nothing would be watched"):
        night.watch()


def test_another_held_out_set_is_not_held_against_the_old_one(night, tmp_path):
    night.monitor.check()
    more = {"category": "facts", "messages": [{"role": "user", "content": "x"},
                                              {"role": "assistant", "content": "chat"}]}  # fmt: skip
    with (tmp_path / "heldout.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(more)}\n")
    report = night.watch().check()
    assert report.measurement.losses["facts"].loss == 1.5
    assert report.ok
    assert report.drift == {"chat": 0.0}
