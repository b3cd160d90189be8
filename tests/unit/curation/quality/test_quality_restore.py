"""Going back to the last good version after a breach, and what happens when that cannot be."""

from __future__ import annotations

import logging
import math

import msgspec
import pytest
from quality_night import night_in

from apollo_curation.chat_client import ModelAway
from apollo_curation.quality.history import QualityHistory
from apollo_ipc.errors import ConfigError, NotReady, UserError


@pytest.fixture
def night(tmp_path):
    with night_in(tmp_path) as night:
        yield night


def test_poison_in_a_short_job_is_found_after_it_and_the_last_good_version_comes_back(night, caplog):
    caplog.set_level(logging.INFO)
    night.change(on_breach="restore")
    night.monitor.before()
    good = dict(night.server.losses)
    batch = night.train("poison", "fine")
    assert batch.state == "trained"
    assert night.labels() == ["before"]
    report = night.monitor.after()
    assert not report.ok
    assert report.may_go_on
    assert (report.restored_version, report.restored_as) == (0, 3)
    assert report.undone == [batch.batch_id]
    assert night.server.losses == good
    assert report.measurement.losses["facts"].loss == 1.0
    assert night.labels() == ["before", "after", "restored"]
    assert [one.action for one in QualityHistory(night.store).list()] == [None, "restored", None]
    assert night.batches.table.list()[0].state == "undone"
    assert {moment.state for moment in night.moments.of_batch(batch.batch_id)} == {"undone"}
    assert "facts: held-out loss 1.0000 -> 1.5000 nats a token (+50.0%), at most 1.0500" in caplog.text
    assert "weight version 0 restored live as 3, 1 batches undone" in caplog.text


def test_after_a_restore_the_night_goes_on_and_the_second_poison_is_undone_alone(night):
    night.change(on_breach="restore")
    night.monitor.before()
    first = night.train("poison")
    assert night.monitor.after().undone == [first.batch_id]
    fine = night.train("fine")
    assert night.monitor.after().ok
    second = night.train("poison")
    report = night.monitor.after()
    # The reference is that of the night: what was fine went with the poison, and says so.
    assert report.undone == [fine.batch_id, second.batch_id]
    assert night.server.restores == [0, 2]
    assert report.may_go_on


def test_a_stop_by_the_guard_counts_even_if_the_last_steps_mended_it(night):
    night.change(on_breach="restore")
    night.monitor.before()
    batch = night.train("poison", *["fine"] * 39)
    assert batch.state == "stopped"
    night.server.losses["facts"] = 1.0
    report = night.monitor.after()
    assert not report.ok
    assert report.restored_version == 0


def test_weights_that_became_nan_are_restored(night):
    night.change(on_breach="restore")
    night.server.effects["nan"] = lambda: night.server.losses.update(chat=math.nan, facts=math.nan)
    night.monitor.before()
    night.train("nan")
    report = night.monitor.after()
    assert [breach.kind for breach in report.breaches] == ["not_a_number", "not_a_number"]
    assert report.may_go_on
    assert report.measurement.loss == 1.5


def test_a_restore_that_is_refused_while_a_job_trains_is_said_and_made_up_for(night):
    night.change(on_breach="restore")
    night.monitor.before()
    batch = night.train("poison")
    night.server.restore_error = ModelAway("refused while a job trains")
    report = night.monitor.after()
    assert report.restore_error == "refused while a job trains"
    assert not report.may_go_on
    assert report.undone == []
    assert night.batches.table.list()[0].state == "trained"
    # The next night, in another process, does it first.
    night.server.restore_error = None
    again = night.watch()
    assert again.before().may_go_on
    assert night.batches.table.list()[0].state == "undone"
    assert night.server.losses["facts"] == 1.0
    assert [moment.state for moment in night.moments.of_batch(batch.batch_id)] == ["undone"]
    assert night.labels()[-2:] == ["restored", "before"]


def test_a_version_that_is_no_longer_kept_is_said(night):
    night.change(on_breach="restore")
    night.monitor.before()
    night.train("poison")
    night.server.restore_error = UserError("version 0 is not kept; there are: 3, 4")
    report = night.monitor.after()
    assert report.restore_error == "version 0 is not kept; there are: 3, 4"
    assert not report.may_go_on
    assert [one.action for one in QualityHistory(night.store).list()] == [None, "not_restored"]


def test_the_reference_is_pinned_and_a_worse_model_leaves_the_pin_where_it_was(night):
    night.monitor.before()
    night.train("fine", "fine")
    night.monitor.after()
    night.watch()
    night.monitor.before()
    assert night.server.pinned == night.monitor.baseline.durable_version == 2
    night.server.poison()
    night.train("fine")
    night.watch()
    assert not night.monitor.before().may_go_on
    assert night.server.pinned == 2


def test_a_reference_that_cannot_be_pinned_is_warned_of_and_training_goes_on(night, caplog):
    night.server.pin_error = NotReady("no model is being served here")
    assert night.monitor.before().may_go_on
    assert "could not be pinned (no model is being served here)" in caplog.text


def test_restoring_needs_versions_that_are_kept(night):
    few = msgspec.structs.replace(night.config.checkpoint, history=0)
    night.config = msgspec.structs.replace(night.config, checkpoint=few)
    night.watch()
    with pytest.raises(ConfigError, match=r"set checkpoint.history to 1 or more"):
        night.change(on_breach="restore")


def test_a_night_that_was_killed_before_its_last_check_is_settled_by_the_next(night):
    night.change(on_breach="restore")
    night.monitor.before()
    batch = night.train("poison")
    again = night.watch()  # the first process is gone, without `after`
    report = again.before()
    assert report.may_go_on
    assert night.batches.table.list()[0].state == "undone"
    assert night.server.losses["facts"] == 1.0
    assert night.labels() == ["before", "after", "restored", "before"]
    assert report.measurement.batch_ids == []
    assert batch.batch_id in QualityHistory(night.store).list()[1].batch_ids


def test_a_killed_night_whose_batch_is_open_keeps_its_reference(night):
    night.monitor.before()
    reference = night.monitor.baseline

    def die(job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        night.batches.train("bootstrap", night.add(*["poison"] * 30), each=die)
    night.monitor = night.watch()
    assert night.monitor.before().measurement == reference
    assert night.labels() == ["before"]
    assert [batch.state for batch in night.batches.resume(each=night.monitor.guard())] == ["stopped"]
    assert not night.monitor.after().may_go_on
