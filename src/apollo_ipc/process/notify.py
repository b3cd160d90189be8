"""systemd's notification protocol (sd_notify(3)), for services of Type=notify."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Sends "READY=1", "STOPPING=1", "WATCHDOG=1", "EXTEND_TIMEOUT_USEC=..."; nothing without systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        # A leading @ stands for the abstract namespace (unix(7)).
        connection.sendto(state.encode(), f"\0{address[1:]}" if address[0] == "@" else address)
