"""Random frames at the worker's socket, and bytes that are no frames. For fuzz.py."""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
from fuzz_grammar import NAMES, ODD, Grammar, changed_bytes, encode
from fuzz_system import BOUND_S, Findings

from apollo_ipc.wire import messages as m

LATE_S = 5.0  # the socket's own thread may be behind the fuzzer's messages
# Of ZMTP 3.1 (rfc.zeromq.org/spec/23): a greeting as libzmq sends it, with the NULL mechanism.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL" + bytes(16) + bytes(32)
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"


class Frames:
    def __init__(self, socket_path: Path, draw: random.Random, tally: Findings):
        self.path, self.draw, self.tally = socket_path, draw, tally
        self.grammar = Grammar(draw)
        self.num_asked = 0

    def turn(self) -> None:
        """Some inputs; then the worker must answer another client."""
        from raw_peer import Peer

        draw = self.draw
        if draw.random() < 0.2:
            for _ in range(3):
                self.bytes_on_the_socket()
        with Peer(self.path.parent) as peer:
            if draw.random() < 0.7:
                peer.hello(draw.choice(("cli", "router")))
            for _ in range(draw.randint(1, 20)):
                kind, frames = self.frames()
                peer.socket.send_multipart(frames)
                self.tally.count(f"frames: {kind}", "sent")
            self.read_answers(peer)
        self.ask_another()

    def frames(self) -> tuple[str, list[bytes]]:
        draw = self.draw
        match draw.randrange(6):
            case 0:
                return "random bytes", [draw.randbytes(draw.choice((0, 1, 8, 300, 70_000)))]
            case 1:
                return "several", [draw.randbytes(3) for _ in range(draw.choice((2, 3, 300)))]
            case 2:
                return "changed bytes", [changed_bytes(draw, m.encode(self.message()))]
            case 3:
                # Lengths that are only claimed, and depth.
                claim = draw.choice(
                    (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
                )
                return "claims", [
                    draw.choice((claim, b"\x91" * 100_000, b"\x81\xa4type" * 5000, b"\xc7\xff\x01"))
                ]
            case 4:
                return "right message", [m.encode(self.message())]
            case _:
                fields = msgspec.to_builtins(self.message())
                for _ in range(draw.choice((1, 1, 3))):
                    fields[draw.choice([*fields, *(name for name in NAMES if name != "\ud800")])] = self.odd()
                return "wrong fields", [msgspec.msgpack.encode(fields)]

    def odd(self) -> Any:
        """As msgpack has it."""
        while True:
            value = self.draw.choice(ODD)
            try:
                msgspec.msgpack.encode(value)
            except (OverflowError, UnicodeEncodeError):
                continue
            return value

    def message(self) -> Any:
        draw, number = self.draw, f"r{self.draw.randrange(1000)}"
        job_id = draw.choice(("job-1", "", "job-000000000000-00000000", "x" * 1000))
        body = encode(self.grammar.train_body())
        return draw.choice(
            (
                m.Hello(draw.choice((m.PROTOCOL_VERSION, 0, -1, 2**40)), "cli", draw.choice((1, -1, 2**40))),
                m.Submit(number, body, draw.choice((None, "k", "k" * 100_000))),
                m.Preview(number, body),
                m.Submit(number, self.grammar.broken(self.grammar.train_body())[0]),
                m.GetStatus(number),
                m.ListJobs(number, draw.choice((0, -1, 50, 2**40, 2**63 - 1))),
                m.GetJob(number, job_id),
                m.CancelJob(number, job_id),
                m.PauseJob(number, job_id),
                m.ResumeJob(number, job_id),
                m.SyncCheckpoint(number, "delta"),
                m.GetHistory(number),
                m.RestoreVersion(number, draw.choice((0, 1, -1, 2**62))),
                m.Watch(number, job_id),
                m.Unwatch(number),
                m.PinVersion(number, draw.choice((None, 0, -1, 2**62))),
                m.CacheDropped(draw.choice((0, 2**62)), True),
            )
        )

    def read_answers(self, peer: Any) -> None:
        """What is there already: an error that is no one's mistake is ours."""
        while peer.socket.poll(20):
            message = m.decode_from_worker(peer.socket.recv())
            if isinstance(message, m.Reply) and (error := message.error) is not None:
                self.tally.count("replies", error.code)
                if error.traceback is not None:
                    self.tally.problem(f"the worker: {error.type}: {error.message}\n{error.traceback}")
            elif isinstance(message, m.Reply | m.JobEvent):
                self.tally.count("replies", type(message).__name__)

    def bytes_on_the_socket(self) -> None:
        draw = self.draw
        data, kind = draw.choice(
            (
                (draw.randbytes(draw.choice((1, 64, 3000))), "no greeting"),
                (GREETING[: draw.randrange(64)], "half a greeting"),
                (changed_bytes(draw, GREETING), "changed greeting"),
                (GREETING + draw.randbytes(200), "no handshake"),
                (GREETING + changed_bytes(draw, READY), "changed handshake"),
                (GREETING + READY + draw.randbytes(300), "no frames"),
                (GREETING + READY + b"\x02\x7f" + b"\xff" * 7 + draw.randbytes(64), "a frame of 2^63 bytes"),
            )
        )
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(2.0)
            try:
                raw.connect(str(self.path))
                raw.sendall(data)
                if draw.random() < 0.5:
                    raw.recv(4096)
                outcome = "taken"
            except TimeoutError:
                outcome = "waits"
            except OSError as error:
                outcome = type(error).__name__
        self.tally.count(f"socket: {kind}", outcome)

    def ask_another(self) -> None:
        from raw_peer import Peer

        started = time.monotonic()
        with Peer(self.path.parent) as peer:
            self.num_asked += 1
            request = m.GetStatus(f"alive{self.num_asked}")
            peer.hello("cli")
            peer.send(request)
            while time.monotonic() - started < BOUND_S:
                reply = peer.receive(m.Reply, timeout_s=LATE_S)
                if reply is not None and reply.request_id == request.request_id:
                    took_s = time.monotonic() - started
                    return self.tally.count("frames: asked after", "answered", took_s)
        self.tally.count("frames: asked after", "hang")
        return self.tally.problem(f"the worker's socket does not answer within {BOUND_S:g} s")
