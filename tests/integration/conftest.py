"""Tiny models made in code, for real vLLM servers. One server a module: starting takes long."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("qwen3", seed=0, ...)`: a fresh copy of a tiny model of that architecture, for one user."""
    from apollo_ipc.demo.models import make_model

    made: dict[tuple, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def make(arch: str, **changes: Any) -> Path:
        key = (arch, *sorted(changes.items(), key=str))
        if key not in made:
            made[key] = make_model(root / f"{arch}-{len(made)}", arch, **changes)
        copy = Path(tempfile.mkdtemp(dir=root)) / arch
        shutil.copytree(made[key], copy)
        return copy

    return make


@pytest.fixture(scope="module")
def short_dir() -> Iterator[Path]:
    """A directory with a short path: a socket's is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="apollo-t-", dir="/tmp") as path:
        yield Path(path)
