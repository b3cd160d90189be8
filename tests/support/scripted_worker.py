"""The worker's end of the socket, doing only what the test says."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import zmq
import zmq.asyncio

from apollo_ipc.wire import messages as m


async def until(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


class ScriptedWorker:
    """The worker's end of the socket, doing only what the test says."""

    def __init__(self, socket):
        self.socket, self.received, self.identity = socket, [], None

    async def read(self):
        while True:
            self.identity, data = await self.socket.recv_multipart()
            self.received.append(m.decode_from_client(data))

    def kinds(self, kind):
        return [message for message in self.received if isinstance(message, kind)]

    async def send(self, message):
        data = message if isinstance(message, bytes) else m.encode(message)
        await self.socket.send_multipart([self.identity, data])

    async def beat(self, version=0, boot_id="boot-1"):
        await self.send(m.Heartbeat(m.PROTOCOL_VERSION, boot_id, None, True, version, m.Progress("idle", 1)))


@asynccontextmanager
async def scripted(path):
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(f"ipc://{path}")
    worker = ScriptedWorker(socket)
    reading = asyncio.create_task(worker.read())
    try:
        yield worker
    finally:
        reading.cancel()
        context.destroy(linger=0)
