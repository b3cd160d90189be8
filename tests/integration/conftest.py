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

import pytest

from apollo_ipc.process.serving import die_with_parent

MAKE_ABLE_MODEL = """
import sys
from pathlib import Path
from apollo_curation.demo.night_model import make_able_model
make_able_model(Path(sys.argv[1]))
"""
being_made: dict[Path, subprocess.Popen[bytes]] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    """The model of the nights takes minutes of computing. The tests before them leave one core idle for long:
    it is begun at once, with what nobody else wants."""
    is_wanted = any("able_model" in item.fixturenames for item in session.items)
    if session.config.option.collectonly or not is_wanted:
        return
    directory = Path(tempfile.mkdtemp(prefix="apollo-able-"))
    with (directory / "log").open("w") as log:
        being_made[directory] = subprocess.Popen(
            [sys.executable, "-c", MAKE_ABLE_MODEL, str(directory / "model")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            preexec_fn=lambda: (die_with_parent(), os.nice(19)),
        )


def pytest_sessionfinish() -> None:
    for directory, process in being_made.items():
        process.kill()
        process.wait()
        shutil.rmtree(directory)


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


@pytest.fixture(scope="session")
def able_model() -> Path:
    """To be copied; see pytest_collection_finish."""
    ((directory, process),) = being_made.items()
    assert process.wait(timeout=800) == 0, (directory / "log").read_text()
    return directory / "model"


@pytest.fixture(scope="module")
def short_dir() -> Iterator[Path]:
    """A directory with a short path: a socket's is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="apollo-t-", dir="/tmp") as path:
        yield Path(path)
