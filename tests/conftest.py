"""The real language model, models that are made once, and lanes for tests that run side by side."""

from __future__ import annotations

import os
import subprocess
import time
import zlib
from pathlib import Path

import pytest
from made_once import MadeOnce
from places import ROOT

from apollo_ipc.demo.real_model import NoRealModel, real_model

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; a lane a core


def pytest_addoption(parser: pytest.Parser) -> None:
    crash = parser.getgroup("crash states")
    crash.addoption("--crash-states", type=int, default=300, help="different states of each protocol")
    crash.addoption("--crash-seed", type=int, help="which of them; without it another one each commit")
    parser.addoption(
        "--until",
        type=float,
        help="time.time() from which no test begins; each commit begins with other files",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.crash_seed is None:
        config.option.crash_seed = _seed_of_the_commit()
    config.option.loadscopereorder = False  # ours holds: xdist's own is by the number of tests


def _seed_of_the_commit() -> int:
    """In each process of a run the same; without git, that of the day."""
    head = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
    try:
        return int(subprocess.run(head, capture_output=True, text=True, check=True).stdout, 16)
    except (OSError, subprocess.CalledProcessError):
        return int(time.time() // 86400)


def pytest_report_header(config: pytest.Config) -> str:
    options = config.option
    return f"crash states: --crash-states={options.crash_states} --crash-seed={options.crash_seed}"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Real vLLM servers are one lane: two at once want more than two cores. Beside it each file stays whole,
    so that what it prepares is prepared once, unless its tests name a group of their own.

    The servers come first: they are the longest lane, and the other one alone compiles what numba keeps."""
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.xdist_group("vllm"), append=False)
        elif item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))
    if config.option.until:
        seed = config.option.crash_seed
        items.sort(key=lambda item: zlib.crc32(f"{seed} {item.path.relative_to(ROOT)}".encode()))
    else:
        items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.option.until and time.time() > item.config.option.until:
        pytest.skip("no time is left; another commit begins with other files")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Lanes that are lost in silence (pytest-dev/pytest-xdist#1386) break up what tests of a file share."""
    if getattr(session.config.option, "loadgroup", False):
        lost = [one.nodeid for one in session.items if "@" not in one.nodeid]
        if lost:
            raise pytest.UsageError(f"xdist has no lane for {lost[0]}, {len(lost)} in all: run `make setup`")


@pytest.fixture(scope="session")
def made_once(pytestconfig: pytest.Config) -> MadeOnce:
    """Directories that are made once for all runs; see made_once.py."""
    return MadeOnce(Path(pytestconfig.cache.mkdir("made-once")))


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """To be read; `copy_real_model(directory)` makes one that may be trained."""
    try:
        return real_model()
    except NoRealModel as error:
        pytest.skip(error.message)
