"""When a tier trains: idleness by vLLM's metrics, and the loop of `curate run`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import msgspec
import pytest
from batch_fixtures import add, config_in, holding

from apollo_curation.chat_client import ChatClient, ServerRefused
from apollo_curation.cli.common import open_learning
from apollo_curation.demo.scripted_model import ScriptedModel
from apollo_curation.moments.moments import Moments
from apollo_curation.settings import CurationConfig, DirectTier, DreamTier, Tier
from apollo_curation.store import Store, store_path
from apollo_curation.training import schedule
from apollo_curation.training.idle import Idleness
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message


@pytest.fixture
def vllm():
    with ScriptedModel(lambda body: "hello") as vllm:
        yield vllm


class Watch:
    """Idleness with a clock that the test turns."""

    def __init__(self, vllm: ScriptedModel, idle_s: float = 30.0):
        self.now = 100.0
        self.model = ChatClient(vllm.url, patience_s=0.0)
        self.idleness = Idleness(self.model, idle_s, clock=lambda: self.now)

    def after(self, seconds: float) -> bool:
        self.now += seconds
        return self.idleness.is_idle()


# --- idleness ---


def test_idle_is_when_nobody_has_asked_for_so_long(vllm):
    watch = Watch(vllm)
    assert not watch.after(0)  # nothing is known of the time before
    assert not watch.after(29)
    assert watch.after(1)
    assert watch.after(1000)


@pytest.mark.parametrize("gauge", ["num_running", "num_waiting"])
def test_whoever_runs_or_waits_is_somebody_until_it_is_done(vllm, gauge):
    watch = Watch(vllm)
    watch.after(0)
    setattr(vllm, gauge, 1)
    assert not watch.after(100)
    setattr(vllm, gauge, 0)
    assert not watch.after(29)
    assert watch.after(1)


def test_a_request_that_came_and_went_between_two_looks_is_seen(vllm):
    watch = Watch(vllm)
    watch.after(0)
    vllm.num_ended += 1
    assert not watch.after(100)
    assert not watch.after(29)
    assert watch.after(1)


def test_our_own_requests_are_not_somebody(vllm):
    watch = Watch(vllm)
    watch.after(0)
    watch.model.chat([Message("user", "judge this")], max_tokens=8)
    assert vllm.num_ended == 1
    assert watch.after(30)
    watch.model.chat([Message("user", "and this")], max_tokens=8)
    vllm.num_ended += 1  # and somebody else
    assert not watch.after(30)


def test_a_vllm_that_was_restarted_is_watched_anew(vllm):
    vllm.num_ended = 50
    watch = Watch(vllm)
    watch.after(0)
    assert watch.after(30)
    vllm.num_ended = 0
    assert not watch.after(30)
    assert watch.after(30)


def test_a_server_without_vllms_metrics_is_named(server, tmp_path):
    idleness = Idleness(ChatClient(server.url, patience_s=0.0), 1.0)
    with pytest.raises(UserError):
        idleness.is_idle()


# --- the loop ---


def set_up(config: CurationConfig, **when: str) -> CurationConfig:
    return msgspec.structs.replace(
        config,
        tier_direct=DirectTier(when=when.get("direct", "continuous")),
        tier_dream=DreamTier(when=when.get("dream", "nightly")),
        tier_bootstrap=Tier(when=when.get("bootstrap", "nightly")),
    )


class Loop:
    """`curate run` in a thread; `until(done)` waits for something and then asks it to stop."""

    def __init__(self, config: CurationConfig, vllm: ScriptedModel | None = None, each=lambda job: None):
        self.config = config
        self.batches = []
        self.away: list[str] = []
        self.asked = threading.Event()
        self.error: BaseException | None = None
        self.model = ChatClient(vllm.url if vllm else config.curation.url, patience_s=0.0)
        self.idleness = Idleness(self.model, config.curation.idle_s)
        self.each = each
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        try:
            with open_learning(self.config, self.asked.is_set) as learning:
                schedule.run(
                    learning,
                    self.idleness,
                    stop=self.asked.is_set,
                    watch=lambda: nullcontext(self.each),
                    on_batch=self.batches.append,
                    on_away=lambda error: self.away.append(str(error)),
                )
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Loop:
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.asked.set()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not done():
            assert self.error is None, self.error
            assert time.monotonic() < deadline
            time.sleep(0.005)


def counts(config: CurationConfig) -> dict[str, int]:
    with Store(store_path(config)) as store:
        return Moments(store).counts()


def test_a_continuous_tier_trains_what_is_approved_as_it_comes(server, tmp_path):
    config = set_up(config_in(tmp_path, server.url))
    with Loop(config) as loop:
        add(config, "a")
        loop.until(lambda: server.trained["a"])
        add(config, "b")
        loop.until(lambda: len(loop.batches) == 2)
    assert loop.error is None
    assert server.trained == {"a": 1, "b": 1}
    assert server.num_syncs == 0  # the worker's own policy


def test_an_idle_tier_trains_when_nobody_asks_and_its_job_is_not_stopped_for_somebody(server, vllm, tmp_path):
    config = set_up(config_in(tmp_path, server.url, idle_s=0.05), direct="idle")
    vllm.num_running = 1
    add(config, "a")

    def come_back(job) -> None:
        vllm.num_running = 1

    with Loop(config, vllm, each=come_back) as loop:
        time.sleep(0.2)  # four times idle_s: somebody is asking all the while
        assert server.requests == []
        vllm.num_running = 0
        loop.until(lambda: loop.batches)
        add(config, "b")
        time.sleep(0.2)
    assert server.trained == {"a": 1}
    assert not [method for method, _ in server.requests if method == "DELETE"]
    assert counts(config) == {"approved": 1, "trained": 1}


def test_a_nightly_tier_is_left_to_the_night(server, tmp_path):
    config = set_up(config_in(tmp_path, server.url))
    add(config, "bulk", tier="bootstrap")
    add(config, "a")
    with Loop(config) as loop:
        loop.until(lambda: loop.batches)
        time.sleep(0.05)
    assert server.trained == {"a": 1}


def test_a_checkpoint_follows_a_nightly_batch_and_no_other(server, tmp_path):
    config = set_up(config_in(tmp_path, server.url))
    add(config, "bulk", tier="bootstrap")
    add(config, "a")
    with open_learning(config) as learning:
        assert learning.train("direct").sync is None
        assert server.num_syncs == 0
        done = learning.train("bootstrap")
        assert done.sync is not None
        assert (done.sync.weight_version, server.num_syncs) == (3, 1)
        assert learning.train("bootstrap").batch is None  # nothing to train: nothing to save
        server.job_end = "failed"
        add(config, "more", tier="bootstrap")
        assert learning.train("bootstrap").sync is None
    assert server.num_syncs == 1


@pytest.mark.parametrize(("hold", "state"), [(0, "training"), (1, "approved")])
def test_the_loop_goes_on_with_what_was_left_open_and_waits_for_a_server_that_is_away(
    server, tmp_path, hold, state
):
    config = holding(set_up(config_in(tmp_path, server.url, patience_s=0.02)), hold)
    add(config, "a", "b")
    server.go_down()
    with Loop(config) as loop:
        loop.until(lambda: len(loop.away) >= 3)
        assert counts(config) == {state: 2}
        server.come_up()
        loop.until(lambda: loop.batches)
    assert (loop.error, server.trained) == (None, {"a": 1, "b": 1})


def test_stopping_leaves_a_running_job_to_the_next_start(server, tmp_path):
    config = set_up(config_in(tmp_path, server.url))
    add(config, "a")
    with Loop(config, each=lambda job: loop.asked.set()) as loop:
        loop.thread.join(10)
    assert (loop.error, loop.batches) == (None, [])
    assert counts(config) == {"training": 1}
    assert server.jobs["job-1"]["info"]["state"] != "cancelled"
    with Loop(config) as loop:
        loop.until(lambda: loop.batches)
    assert server.trained == {"a": 1}


def test_a_batch_that_fails_is_not_tried_for_ever(server, tmp_path):
    config = set_up(config_in(tmp_path, server.url))
    server.job_end = "failed"
    add(config, "a")
    with Loop(config) as loop:
        loop.until(lambda: loop.batches)
        time.sleep(0.05)
    assert [batch.state for batch in loop.batches] == ["failed"]
    assert len(server.jobs) == 1


def test_a_wrong_key_ends_the_loop_with_the_servers_words(server, tmp_path):
    config = set_up(config_in(tmp_path, server.url))
    server.faults = [401]
    add(config, "a")
    with Loop(config) as loop:
        loop.thread.join(10)
    assert isinstance(loop.error, ServerRefused)
    assert "as the test says" in str(loop.error)


def test_moments_of_which_none_can_be_chosen_are_not_looked_at_each_time(server, tmp_path, monkeypatch):
    config = set_up(config_in(tmp_path, server.url, min_surprise=5.0))
    add(config, "a", surprise=1.0)
    num = 0
    before = schedule.choose

    def counted(*arguments, **options):
        nonlocal num
        num += 1
        return before(*arguments, **options)

    monkeypatch.setattr(schedule, "choose", counted)
    with Loop(config) as loop:
        loop.until(lambda: num)
        time.sleep(0.1)
        assert num == 1
        add(config, "b", surprise=9.0)
        loop.until(lambda: loop.batches)
    assert server.trained == {"b": 1}
