"""A stream of events whose client goes away at any moment ends without a trace."""

from __future__ import annotations

import asyncio

import anyio
from apollo_router.events import event_stream
from apollo_router.gateway import Gateway
from fake_worker import short_dir

from apollo_ipc.wire.client import WorkerClient

HEARTBEAT_S = 0.02


def test_a_client_may_hang_up_at_any_moment_of_a_stream(config):
    gateway, unhandled = Gateway(config), []

    async def follow(client):
        async for _ in event_stream(gateway, client.watch("job-1"), heartbeat_s=HEARTBEAT_S):
            pass

    async def hang_up(client, after_s):
        """As Starlette does it where the server tells it that the client has gone."""
        async with anyio.create_task_group() as group:
            group.start_soon(follow, client)
            await asyncio.sleep(after_s)
            group.cancel_scope.cancel()

    async def main(directory):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unhandled.append(context))
        async with WorkerClient(directory / "nobody.sock", "router") as client:
            streams = []
            for i in range(30):
                streams.append(asyncio.create_task(follow(client)))
                await asyncio.sleep(HEARTBEAT_S + i * HEARTBEAT_S / 30)
                streams[-1].cancel()
            ends = await asyncio.gather(*streams, return_exceptions=True)
            assert {type(end) for end in ends} == {asyncio.CancelledError}
            hung_up = (hang_up(client, HEARTBEAT_S + i * HEARTBEAT_S / 30) for i in range(30))
            assert set(await asyncio.gather(*hung_up, return_exceptions=True)) == {None}
            assert not client._watches
        await asyncio.sleep(0.1)

    with short_dir() as directory:
        asyncio.run(main(directory))
    assert unhandled == []
