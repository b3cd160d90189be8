"""A few hundred of the inputs of benchmarks/fuzz.py, always the same: what they show is due to the change."""

from __future__ import annotations

import asyncio
import random

import fuzz_files
from fuzz_routes import Routes
from fuzz_socket import Frames
from fuzz_system import SETTINGS, Findings, routes
from router_harness import FakeWorker, make_config

NUM_REQUESTS, NUM_CLIENTS, NUM_FILES = 250, 12, 15
SEED = 57928923


def test_no_request_and_no_frame_gets_more_than_an_answer(monkeypatch):
    draw = random.Random(SEED)
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    config, tally = make_config(train_key=SETTINGS["APOLLO_HTTP__TRAIN_KEY"], wait_timeout_s=1.0), Findings()

    async def run() -> None:
        async with routes() as app:
            requests, frames = Routes(app, draw, tally), Frames(config.socket_path, draw, tally)
            for _ in range(NUM_REQUESTS):
                await requests.turn()
            for _ in range(NUM_CLIENTS):
                await asyncio.to_thread(frames.turn)
            for _ in range(NUM_REQUESTS // 10):
                await requests.turn()

    with FakeWorker(config):
        asyncio.run(run())
    assert tally.problems == []
    assert tally.num_inputs > NUM_REQUESTS


def test_no_damage_of_a_file_is_trusted(tmp_path):
    world = fuzz_files.World(tmp_path, SEED)
    try:
        said = [world.turn() for _ in range(NUM_FILES)]
    finally:
        world.exporter.kill()
    assert [one["problem"] for one in said if one["problem"]] == []
    assert len({one["outcome"] for one in said}) > 1
