"""A client of the worker's socket that does exactly what the test says."""

from __future__ import annotations

import os
import time

import zmq

from apollo_ipc.wire import messages as m


class Peer:
    """A client that does exactly what the test says."""

    def __init__(self, directory):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, 3000)
        self.socket.connect(f"ipc://{directory}/worker.sock")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.destroy(linger=0)

    def send(self, message):
        self.socket.send(message if isinstance(message, bytes) else m.encode(message))

    def hello(self, role="router", vllm_boot_id=None, protocol=m.PROTOCOL_VERSION):
        self.send(m.Hello(protocol, role, os.getpid(), vllm_boot_id))

    def receive(self, *kinds, timeout_s=3.0):
        """The next message of one of `kinds`, others skipped; None where there is none in time."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if self.socket.poll(left_s * 1000):
                message = m.decode_from_worker(self.socket.recv())
                if isinstance(message, kinds):
                    return message
        return None

    def ask(self, message, timeout_s=5.0):
        self.send(message)
        ack = self.receive(m.Ack, m.Reply, timeout_s=1.0)
        assert ack == m.Ack(message.request_id)
        reply = self.receive(m.Reply, timeout_s=timeout_s)
        assert reply.request_id == message.request_id
        return reply
