"""What processes hold in memory of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def own_memory(pids: Mapping[str, int | None]) -> dict[str, int]:
    """name -> resident bytes that belong to no file and are shared with nobody (RssAnon of proc(5)): mapped
    weights are vLLM's. A process that is not there is left out."""
    found = {}
    for name, pid in pids.items():
        if pid is not None and (size := _own_memory(pid)) is not None:
            found[name] = size
    return found


def _own_memory(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
