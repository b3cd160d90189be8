"""Who is connected to the worker, and which jobs they watch. Only the server's loop touches these."""

from __future__ import annotations

import asyncio
from collections.abc import Container

import msgspec

from apollo_ipc.errors import ApolloError, NotReady
from apollo_ipc.wire.messages import PEER_TIMEOUT_S, PROTOCOL_VERSION, Hello

MAX_WATCHES_PER_PEER = 64


class Peer(msgspec.Struct, frozen=True):
    hello: Hello
    heard_at: float  # time.monotonic()
    refusal: ApolloError | None = None  # it speaks another protocol version


class Peers:
    """Peers by their ZMQ identity, which the ROUTER socket makes up for each connection. `now` is
    time.monotonic()."""

    def __init__(self) -> None:
        self._peers: dict[bytes, Peer] = {}

    def __contains__(self, identity: object) -> bool:
        return identity in self._peers

    def greet(self, identity: bytes, hello: Hello, now: float) -> bool:
        """Whether the peer is new."""
        is_new = identity not in self._peers
        self._peers[identity] = Peer(hello, now)
        return is_new

    def refuse(self, identity: bytes, hello: Hello, now: float) -> ApolloError:
        refusal = NotReady(
            f"this worker speaks protocol version {PROTOCOL_VERSION}, the client (pid {hello.pid}) version "
            f"{hello.protocol}; restart both with the same apollo-ipc",
            code="protocol_mismatch",
        )
        self._peers[identity] = Peer(hello, now, refusal)
        return refusal

    def refusal(self, identity: bytes) -> ApolloError | None:
        peer = self._peers.get(identity)
        return peer.refusal if peer else None

    def forget(self, identity: bytes) -> None:
        self._peers.pop(identity, None)

    def alive(self, now: float) -> list[bytes]:
        """Those that get heartbeats. Peers silent for PEER_TIMEOUT_S are forgotten."""
        for identity, peer in list(self._peers.items()):
            if now - peer.heard_at > PEER_TIMEOUT_S:
                del self._peers[identity]
        return [identity for identity, peer in self._peers.items() if peer.refusal is None]

    def routers(self, vllm_boot_id: str | None, now: float) -> list[bytes]:
        """The live routers inside that vLLM or one not known yet; surest first: named it, heard from last."""
        fitting = [
            (peer.hello.vllm_boot_id == vllm_boot_id, peer.heard_at, identity)
            for identity, peer in self._peers.items()
            if peer.refusal is None
            and peer.hello.role == "router"
            and now - peer.heard_at <= PEER_TIMEOUT_S
            and peer.hello.vllm_boot_id in (vllm_boot_id, None)
        ]
        return [identity for _, _, identity in sorted(fitting, reverse=True)]

    @property
    def num_routers(self) -> int:
        return sum(peer.refusal is None and peer.hello.role == "router" for peer in self._peers.values())


class Watches:
    """(peer, request_id) -> job, and which watched jobs have news."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[bytes, str], str] = {}
        self._with_news: set[str] = set()
        self._news = asyncio.Event()

    def add(self, identity: bytes, request_id: str, job_id: str) -> None:
        """The same watch again only asks for its event again. Raises NotReady (code `too_many_watches`)."""
        num_watches = sum(of == identity for of, _ in self._jobs)
        if (identity, request_id) not in self._jobs and num_watches >= MAX_WATCHES_PER_PEER:
            raise NotReady(
                f"one client may watch {MAX_WATCHES_PER_PEER} jobs at a time; ask for the job instead",
                code="too_many_watches",
            )
        self._jobs[identity, request_id] = job_id
        self.note_change(job_id)

    def remove(self, identity: bytes, request_id: str) -> None:
        self._jobs.pop((identity, request_id), None)

    def keep_only(self, identities: Container[bytes]) -> None:
        for identity, request_id in list(self._jobs):
            if identity not in identities:
                self.remove(identity, request_id)

    def of(self, job_id: str) -> list[tuple[bytes, str]]:
        return [watch for watch, watched in self._jobs.items() if watched == job_id]

    def note_change(self, job_id: str) -> None:
        self._with_news.add(job_id)
        self._news.set()

    async def changed(self) -> list[str]:
        """Waits for news; the watched jobs that have any, each once."""
        await self._news.wait()
        self._news.clear()
        with_news, self._with_news = self._with_news, set()
        watched = set(self._jobs.values())
        return sorted(with_news & watched)
