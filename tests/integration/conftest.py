"""Tiny models made in code, for real vLLM servers. One server a module: starting takes long."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import able_model as able
import pytest
from made_once import MadeOnce
from places import SUPPORT

from apollo_ipc.process.serving import die_with_parent

being_made: list[subprocess.Popen[bytes]] = []

MAKE_ABLE_MODEL = """
import sys
from pathlib import Path
from able_model import make
from made_once import MadeOnce
make(MadeOnce(Path(sys.argv[1])))
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """The model of the nights takes minutes of computing. The tests before them leave one core idle for long:
    it is begun at once, with what nobody else wants, unless an earlier run has made it."""
    config = session.config
    is_wanted = any("able_model" in item.fixturenames for item in session.items)
    if config.option.collectonly or not is_wanted or os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        return
    once = MadeOnce(Path(config.cache.mkdir("made-once")))
    if able.path(once).exists():
        return
    being_made.append(
        subprocess.Popen(
            [sys.executable, "-c", MAKE_ABLE_MODEL, str(once.root)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)},
            preexec_fn=lambda: (die_with_parent(), os.nice(19)),
        )
    )


def pytest_sessionfinish() -> None:
    for process in being_made:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def models(made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("qwen3", seed=0, ...)`: a fresh copy of a tiny model of that architecture, for one user."""
    root = tmp_path_factory.mktemp("models")

    def make(arch: str, **changes: Any) -> Path:
        from apollo_ipc.demo import models

        made = made_once.directory(
            lambda directory: models.make_model(directory, arch, **changes),
            f"tiny-{arch}", [Path(models.__file__)], *sorted(changes.items(), key=str),
        )  # fmt: skip
        copy = Path(tempfile.mkdtemp(dir=root)) / arch
        shutil.copytree(made, copy)
        return copy

    return make


@pytest.fixture(scope="session")
def able_model(made_once: MadeOnce) -> Path:
    """To be copied; see pytest_collection_finish."""
    return able.make(made_once)


@pytest.fixture(scope="module")
def short_dir() -> Iterator[Path]:
    """A directory with a short path: a socket's is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="apollo-t-", dir="/tmp") as path:
        yield Path(path)
