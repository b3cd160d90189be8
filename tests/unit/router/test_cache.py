"""Old KV is dropped once a weight version, whatever the number of API servers and of what goes wrong."""

from __future__ import annotations

import asyncio
import itertools
import time
import types
from contextlib import AsyncExitStack, asynccontextmanager

import fake_worker
import msgspec
import pytest
from apollo_router import cache as cache_module
from apollo_router.cache import CacheDropper
from fake_worker import serving, short_dir
from router_harness import FakeEngine
from scripted_worker import scripted, until

from apollo_ipc.wire import messages as m
from apollo_ipc.wire.client import WorkerClient


class Engine(FakeEngine):
    """num_failures: so many drops fail first; takes_s: how long one takes; processor: with its requests."""

    def __init__(self, num_failures: int = 0, takes_s: float = 0.0, processor: Processor | None = None):
        super().__init__()
        self.output_processor = processor
        self.num_failures, self.takes_s = num_failures, takes_s
        self.num_running = self.most_running = self.num_drops = 0

    async def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False) -> bool:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(self.takes_s)
        self.num_running -= 1
        if self.num_failures:
            self.num_failures -= 1
            return False
        self.num_drops += 1
        return True


@asynccontextmanager
async def api_server(path, engine, vllm_boot_id="here"):
    """As much of one as drops caches."""
    cache = CacheDropper()
    cache.set_engine(engine)
    async with WorkerClient(path, "router", cache.want, lambda: vllm_boot_id) as client:
        running = asyncio.create_task(cache.run(client.tell))
        await until(lambda: client.is_alive)
        yield client
        running.cancel()


@pytest.fixture
def worker():
    with short_dir() as directory, serving(directory) as (server, board, _):
        board.state.vllm_boot_id, board.state.attached = "here", True
        yield directory / "worker.sock", server, board


def publish(server, board, version):
    board.state.weight_version = version
    return asyncio.to_thread(server.publish, version)


@pytest.mark.parametrize("num_servers", [1, 2, 4])
def test_a_version_is_dropped_once_whatever_the_number_of_api_servers(worker, num_servers):
    path, server, board = worker

    async def main():
        engine = Engine()
        async with AsyncExitStack() as stack:
            for _ in range(num_servers):
                await stack.enter_async_context(api_server(path, engine))
            for version in (1, 2, 3):
                assert await publish(server, board, version)
                assert engine.num_drops == version
            board.state.weight_version = 4  # an attach raises the version without publishing it
            await until(lambda: engine.num_drops == 4)
            await asyncio.sleep(3 * m.HEARTBEAT_INTERVAL_S)
            assert engine.num_drops == 4

    asyncio.run(main())


def test_only_a_router_of_the_vllm_that_is_attached_is_asked(worker):
    path, server, board = worker

    async def main():
        here, elsewhere = Engine(), Engine()
        async with api_server(path, elsewhere, "elsewhere"), api_server(path, here):
            assert await publish(server, board, 1)
            assert (here.num_drops, elsewhere.num_drops) == (1, 0)

    asyncio.run(main())


def test_a_version_that_was_not_dropped_is_asked_for_again(worker):
    path, server, board = worker
    board.state.weight_version = 4

    async def main():
        engine = Engine(num_failures=1)
        async with api_server(path, engine):  # it comes late
            await until(lambda: engine.num_drops == 1)
            assert await publish(server, board, 4)
            assert engine.num_drops == 1, "done already"
            engine.num_failures = 1
            assert not await publish(server, board, 5)
            await until(lambda: engine.num_drops == 2)

    asyncio.run(main())


def test_a_new_vllm_starts_with_nothing_dropped(worker):
    path, _, board = worker
    board.state.weight_version = 4

    async def main():
        first, second = Engine(), Engine()
        async with api_server(path, first):
            await until(lambda: first.num_drops == 1)
        board.state.vllm_boot_id = "next"
        async with api_server(path, second, "next"):
            await until(lambda: second.num_drops == 1)

    asyncio.run(main())


def test_a_new_worker_asks_for_a_drop_whatever_the_version(monkeypatch):
    """It may have restored older weights."""

    async def main(path, board, engine):
        async with api_server(path, engine):
            await until(lambda: engine.num_drops == 1)

    for _ in range(2):
        with short_dir() as directory, serving(directory) as (_, board, _):
            board.state.vllm_boot_id, board.state.attached, board.state.weight_version = "here", True, 3
            asyncio.run(main(directory / "worker.sock", board, Engine()))


def test_a_drop_that_takes_longer_than_the_wait_counts_when_it_is_done(worker):
    path, server, board = worker

    async def main():
        engine = Engine(takes_s=0.8)
        async with api_server(path, engine):
            started = time.monotonic()
            board.state.weight_version = 1
            assert not await asyncio.to_thread(server.publish, 1, 0.2)
            assert time.monotonic() - started < 0.7
            await until(lambda: engine.num_drops == 1)
            await asyncio.sleep(1.5)
            assert engine.num_drops == 1

    asyncio.run(main())


def test_drops_never_overlap_and_the_newest_version_wins():
    async def main(path):
        engine, cache = Engine(takes_s=0.2), CacheDropper()
        cache.set_engine(engine)
        async with scripted(path) as worker, WorkerClient(path, "router", cache.want) as client:
            running = asyncio.create_task(cache.run(client.tell))
            await until(lambda: worker.kinds(m.Hello))
            for version in (1, 2, 3):
                await worker.send(m.DropCache(version))
                await asyncio.sleep(0.03)
            await until(lambda: m.CacheDropped(3, ok=True) in worker.received)
            assert (engine.num_drops, engine.most_running) == (2, 1)
            assert worker.kinds(m.CacheDropped) == [m.CacheDropped(1, ok=True), m.CacheDropped(3, ok=True)]
            running.cancel()

    with short_dir() as directory:
        asyncio.run(main(directory / "worker.sock"))


class Processor:
    """As much of vLLM's OutputProcessor as tells how far a request is."""

    def __init__(self) -> None:
        self.request_states = {"a prompt": types.SimpleNamespace(detokenizer=self)}
        self.num_tokens = 0

    def num_output_tokens(self) -> int:
        return self.num_tokens


@pytest.mark.parametrize("end", ["a token", "its end", "patience"])
def test_what_a_drop_preempted_gets_on_before_the_next_drop(worker, monkeypatch, end):
    path, server, board = worker
    if end == "patience":
        monkeypatch.setattr(cache_module, "PATIENCE_S", 0.6)

    async def main():
        engine = Engine(processor=Processor())
        async with api_server(path, engine):
            assert await publish(server, board, 1), "never preempted before: dropped at once"
            publishing = asyncio.create_task(publish(server, board, 2))
            await asyncio.sleep(0.3)
            assert engine.num_drops == 1
            if end == "a token":
                engine.output_processor.num_tokens += 1
            elif end == "its end":
                engine.output_processor.request_states.clear()
            assert await publishing
            assert engine.num_drops == 2

    asyncio.run(main())


def test_a_failed_drop_is_tried_again_at_once_and_a_vllm_of_other_classes_is_not_waited_for(worker):
    path, server, board = worker

    async def main():
        failing = Engine(num_failures=1, processor=Processor())
        async with api_server(path, failing):
            assert not await publish(server, board, 1)
            await until(lambda: failing.num_drops == 1)
        other = Engine(processor=Processor())
        other.output_processor.request_states = {"a prompt": object()}
        board.state.vllm_boot_id = "next"
        async with api_server(path, other, "next"):
            for version in (2, 3):
                assert await publish(server, board, version)
        assert other.num_drops == 2

    asyncio.run(main())


def test_a_publish_waits_longer_for_a_router_that_says_that_it_waits(worker):
    path, server, board = worker

    async def main():
        engine = Engine(processor=Processor())
        async with api_server(path, engine):
            assert await publish(server, board, 1)
            board.state.weight_version = 2
            publishing = asyncio.create_task(asyncio.to_thread(server.publish, 2, 0.2))
            await asyncio.sleep(1.0)
            assert not publishing.done()
            engine.output_processor.num_tokens += 1
            assert await publishing

    asyncio.run(main())


def test_two_drops_are_a_distance_apart_and_a_publish_waits_for_it(monkeypatch):
    async def main(path, server, board):
        engine, dropped_at = Engine(), []
        async with api_server(path, engine):
            for version in (1, 2, 3):
                assert await publish(server, board, version)
                assert engine.num_drops == version
                dropped_at.append(time.monotonic())
            assert min(b - a for a, b in itertools.pairwise(dropped_at)) > 0.35

    real = fake_worker.config_in

    def config_in(directory):
        config = real(directory)
        train = msgspec.structs.replace(config.train, publish_distance_s=0.4)
        return msgspec.structs.replace(config, train=train)

    monkeypatch.setattr(fake_worker, "config_in", config_in)
    with short_dir() as directory, serving(directory) as (server, board, _):
        board.state.vllm_boot_id, board.state.attached = "here", True
        started = time.monotonic()
        assert not server.publish(1), "no router: nothing to wait for"
        assert time.monotonic() - started < 0.3
        asyncio.run(main(directory / "worker.sock", server, board))
