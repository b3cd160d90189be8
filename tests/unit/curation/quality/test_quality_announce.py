"""A broken threshold is told once, also where the process that found it was killed before it could."""

from __future__ import annotations

import msgspec
import pytest
from test_quality_report import measured

from apollo_curation.quality.announce import announce_breaches
from apollo_curation.quality.history import Breach, QualityHistory
from apollo_curation.store import Store, store_path
from apollo_ipc.config import Config, Paths, Webhooks
from apollo_ipc.webhooks.outbox import Outbox, outbox_path

URL = "http://hooks.test/in"


@pytest.fixture
def config(tmp_path):
    return Config(paths=Paths(state_dir=str(tmp_path)), webhooks=Webhooks(urls=[URL]))


@pytest.fixture
def history(config):
    with Store(store_path(config)) as store:
        yield QualityHistory(store)


def broken(at):
    breach = Breach("loss", "facts", 1.0, 2.0, 1.5, f"facts: worse at {at}")
    return msgspec.structs.replace(measured("after", at, 3, {"facts": 2.0}), breaches=[breach])


def told(config):
    outbox = Outbox(outbox_path(config), [URL])
    try:
        return [(one.type, one.event_id.rpartition("_")[2]) for one in reversed(outbox.deliveries())]
    finally:
        outbox.close()


def test_each_breach_is_told_once_and_old_ones_are_no_news(config, history):
    history.add(broken(0))
    history.add(measured("after", 1, 3, {"facts": 1.0}))
    announce_breaches(config, history)
    assert told(config) == []
    second = history.add(broken(2))
    history.add(measured("after", 3, 3, {"facts": 1.0}))
    third = history.add(broken(4))  # the process before was killed after these were kept
    announce_breaches(config, history)
    announce_breaches(config, history)
    ids = [str(one.measurement_id) for one in (second, third)]
    assert told(config) == [("quality.breach", one) for one in ids]


def test_the_first_measurement_of_all_is_told_where_it_is_broken(config, history):
    history.add(broken(0))
    announce_breaches(config, history)
    assert len(told(config)) == 1


def test_where_nobody_is_to_be_told_no_file_is_made(config, history):
    silent = msgspec.structs.replace(config, webhooks=Webhooks())
    history.add(broken(0))
    announce_breaches(silent, history)
    assert not outbox_path(config).exists()
