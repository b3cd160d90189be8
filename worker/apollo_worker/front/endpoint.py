"""The worker's socket file: one worker a directory, and nobody else's processes on it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from apollo_ipc.config import make_private_dir
from apollo_ipc.errors import AlreadyRunning
from apollo_ipc.hold import Held, Hold
from apollo_ipc.wire.client import MAX_WAITING_MESSAGES, ipc_address
from apollo_ipc.wire.messages import MAX_MESSAGE_BYTES

logger = logging.getLogger(__name__)


class Endpoint:
    """`lock`, `bind`, then `unlock` once the socket is closed.

    libzmq unlinks the path before it binds (ipc_listener.cpp, set_local_address) and when it closes: without
    the lock a second worker would take over the path in silence, with it a dead worker's file is no obstacle.
    """

    def __init__(self, runtime_dir: Path, socket_path: Path):
        self._lock_path = runtime_dir / "worker.lock"
        self._socket_path = socket_path
        self._hold: Hold | None = None

    def lock(self) -> None:
        """Raises AlreadyRunning naming the holder; ConfigError (directory of another user, path too
        long)."""
        ipc_address(self._socket_path)
        make_private_dir(self._lock_path.parent)
        try:
            self._hold = Hold(self._lock_path, "the worker")
        except Held as held:
            raise AlreadyRunning(
                f"{held.who} already serves {self._lock_path.parent}; stop it first, or choose another "
                "paths.runtime_dir"
            ) from None

    def unlock(self) -> None:
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    def bind(self, context: zmq.asyncio.Context) -> Any:
        """The bound ROUTER socket, for the event loop that runs here. The lock is held."""
        assert self._hold is not None
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(
            zmq.ROUTER_MANDATORY, 1
        )  # a send to a peer that has gone fails instead of vanishing
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, MAX_WAITING_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, MAX_WAITING_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            # Beside the directory's mode: libzmq asks the kernel (SO_PEERCRED) and hangs up on other users.
            socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())
        except zmq.ZMQError as error:
            logger.warning("libzmq cannot check its peers' user (%s); the directory's mode must do", error)
        previous = os.umask(0o177)
        try:
            socket.bind(ipc_address(self._socket_path))
        finally:
            os.umask(previous)
        return socket
