"""The night's own part: what follows what, what is skipped, and how it ends. Nights on a real server are in
tests/integration/test_night.py."""

from __future__ import annotations

import json

import msgspec
import pytest
from batch_fixtures import config_in
from training_server import TrainingServer

from apollo_curation import night as nights
from apollo_curation.demo import night as demo
from apollo_curation.lock import alone
from apollo_curation.moments.moments import Moments
from apollo_curation.moments.surprise import ScoreCounts
from apollo_curation.night import run_night
from apollo_curation.settings import Judge, Quality
from apollo_curation.store import Store, store_path
from apollo_curation.training.batches import BatchTable
from apollo_ipc.errors import AlreadyRunning, ConfigError


@pytest.fixture
def server():
    with TrainingServer() as server:
        yield server


def log(path, *pairs):
    path.parent.mkdir(exist_ok=True)
    lines = [
        json.dumps({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]})
        for a, b in pairs
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path.parent)


@pytest.fixture
def config(tmp_path, server, monkeypatch):
    """Followed logs alone: no judge, no monitor; how surprising an answer is is not asked."""
    monkeypatch.setattr(nights, "score", lambda moments, model, which: ScoreCounts(num_scored=len(which)))
    followed = log(tmp_path / "followed" / "a.jsonl", ("one?", "answer one"), ("two?", "answer two"))
    config = config_in(
        tmp_path / "state", server.url, bootstrap=[followed], patience_s=0.2, max_source_share=1.0
    )
    return msgspec.structs.replace(config, judge=Judge(enabled=False), quality=Quality(enabled=False))


def run(config, **options):
    with Store(store_path(config)) as store:
        return run_night(config, store, **{"is_auto": False, **options})


def facts(report, name):
    stage = report.stage(name)
    assert stage is not None, [one.name for one in report.stages]
    return stage.facts


def test_a_night_trains_what_is_new_once_and_writes_its_report(config, server):
    said = []
    first = run(config, say=said.append)
    assert (first.exit_code, first.ended) == (0, "everything was done")
    assert facts(first, "read")["followed"] == 2
    assert facts(first, "train") == {"jobs": 1, "bootstrap": 2}
    assert server.trained == {"answer one": 1, "answer two": 1}
    assert server.num_syncs == 1
    assert [line.split(":")[0] for line in said] == [stage.name for stage in first.stages]
    page = (config.state_dir / "reports").glob("night-*.html")
    assert [str(path) for path in page] == [first.html]
    again = run(config)
    assert (again.exit_code, again.stage("train").num_done) == (0, 0)
    assert sum(server.trained.values()) == 2


def test_a_night_says_why_what_is_approved_was_left(config, server):
    own = msgspec.structs.replace(config.curation, max_examples_per_window=1)
    report = run(msgspec.structs.replace(config, curation=own))
    assert facts(report, "train") == {"jobs": 1, "bootstrap": 1, "left, window budget": 1}


def test_a_server_that_is_away_ends_the_night_with_69_and_the_next_one_goes_on(config, server):
    server.go_down()
    report = run(config)
    assert report.exit_code == 69
    assert "did not answer" in report.ended
    assert report.stage("read").num_done == 2  # what was read is kept
    assert report.stage("checkpoint") is None
    server.come_up()
    report = run(config)
    assert (report.exit_code, facts(report, "read")["followed"]) == (0, 0)
    assert server.trained == {"answer one": 1, "answer two": 1}


def test_a_job_that_fails_makes_the_exit_status_1_and_the_night_goes_on(config, server):
    server.job_end = "failed"
    report = run(config)
    assert (report.exit_code, facts(report, "train")["failed"]) == (1, 1)
    assert report.stage("checkpoint").problem is None


def test_a_night_that_is_asked_to_stop_writes_its_report_and_trains_nothing(config, server):
    report = run(config, stop=lambda: True)
    assert report.ended == "it was asked to stop"
    assert [stage.name for stage in report.stages] == ["watch", "report"]
    assert not server.trained


def test_two_nights_at_once_are_one_too_many(config):
    config.state_dir.mkdir(mode=0o700, exist_ok=True)
    with alone(config.state_dir / "curation.night.lock"), pytest.raises(AlreadyRunning) as raised:
        run(config)
    assert raised.value.exit_code == 75


def test_without_a_heldout_set_a_night_refuses_to_run(config):
    watched = msgspec.structs.replace(config, quality=Quality())
    with pytest.raises(ConfigError, match=r"no held-out set.*quality.enabled") as raised:
        run(watched)
    assert (raised.value.field, raised.value.exit_code) == ("quality.heldout", 78)


@pytest.mark.parametrize("sources", ["{}", "{}/a.jsonl", "{}/..", "{}/../followed"])
def test_a_log_that_is_followed_and_looked_through_is_refused(config, server, sources):
    both = sources.format(config.curation.bootstrap[0])
    own = msgspec.structs.replace(config.curation, sources=[both])
    with (
        Store(store_path(config)) as store,
        pytest.raises(ConfigError, match="either followed or looked through"),
    ):
        run_night(msgspec.structs.replace(config, curation=own), store, is_auto=False)
    assert not server.trained


def test_what_is_in_the_heldout_set_is_dropped_instead_of_trained(config, server, monkeypatch):
    class Watching:
        baseline = None

        def __init__(self, *_):
            pass

        def before(self):
            class Report:
                may_go_on = True

                class measurement:
                    losses, canaries = {}, []

            return Report

        def guard(self):
            return lambda job: None

        def find_overlap(self, moments):
            return [one for one in moments if one.answer.content == "answer two"]

    monkeypatch.setattr(nights, "Monitor", Watching)
    report = run(msgspec.structs.replace(config, quality=Quality(enabled=True)))
    assert report.exit_code == 0
    assert server.trained == {"answer one": 1}
    with Store(store_path(config)) as store:
        (dropped,) = Moments(store).list("dropped")
        assert (dropped.answer.content, dropped.decided_reason) == ("answer two", "it is in the held-out set")
        assert len(BatchTable(store).list()) == 1


def test_the_demonstration_is_not_content_with_a_stage_that_did_nothing():
    stages = [
        {"name": name, "num_done": least, "facts": {"flagged": 1, "followed": 1, "broken": 1, "held": 1}}
        for name, least in demo.MUST_DO.items()
    ]
    good = demo.DemoNight(
        night={"stages": stages}, exit_code=0, html_bytes=1, shifts=[demo.Shift("a", before=2.0, after=1.0)]
    )
    assert good.find_problems() == []
    for i in range(len(stages)):
        idle = [{**stage, "num_done": 0} if k == i else stage for k, stage in enumerate(stages)]
        (problem,) = msgspec.structs.replace(good, night={"stages": idle}).find_problems()
        assert f"the stage {stages[i]['name']!r} did 0" in problem
    unmoved = msgspec.structs.replace(good, shifts=[demo.Shift("a", before=2.0, after=2.0)])
    assert unmoved.find_problems() == ["a: 2.000 -> 2.000 nats a token, not less"]
    assert msgspec.structs.replace(good, exit_code=1).find_problems() == ["the night ended with 1"]
    assert msgspec.structs.replace(good, html_bytes=0).find_problems() == ["no report was written"]
