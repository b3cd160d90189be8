"""Fixtures that several files share: the command line in this process, tiny models to copy."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from places import ROOT, SUPPORT

from apollo_curation.settings import CurationConfig
from apollo_ipc.cli.main import main
from apollo_ipc.config import Paths


@pytest.fixture
def config(tmp_path):
    # Short: a Unix socket's path holds 107 bytes.
    config = CurationConfig(paths=Paths(str(tmp_path / "run"), str(tmp_path / "state")))
    for directory in (config.runtime_dir, config.state_dir):
        directory.mkdir(mode=0o700)
    return config


@pytest.fixture
def environment(config, monkeypatch):
    for name in os.environ:
        if name.startswith("APOLLO_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("APOLLO_PATHS__RUNTIME_DIR", str(config.runtime_dir))
    monkeypatch.setenv("APOLLO_PATHS__STATE_DIR", str(config.state_dir))


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def apollo(environment, tmp_path, monkeypatch, capfd):
    """`apollo("train", "x.jsonl")` -> what it did, in this process: starting one takes half a second."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["apollo-ipc", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        return Done(exit.value.code, *capfd.readouterr())

    return run


MODELS = ROOT / "src/apollo_ipc/demo/models.py"  # its path: importing it takes torch

# What imports torch or transformers is imported where it is used: most tests do without.


@pytest.fixture(scope="session")
def tiny_model(made_once) -> Path:
    """To be copied."""

    def make(directory: Path) -> None:
        from served_model import make_tiny_model

        make_tiny_model(directory)

    return made_once.directory(make, "tiny", [SUPPORT / "served_model.py", MODELS])


@pytest.fixture(scope="session")
def templates(made_once) -> dict[str, Path]:
    """To be copied."""
    shapes = {
        "single": {"shard_size": "1GB"},
        "multi": {"shard_size": "100KB"},
        "tied": {"shard_size": "1GB", "tied": True},
    }

    def make(directory: Path) -> None:
        from saved_model import save_model

        for name, shape in shapes.items():
            save_model(directory / name, **shape)

    made = made_once.directory(make, "templates", [SUPPORT / "saved_model.py"], shapes)
    return {name: made / name for name in shapes}


@pytest.fixture
def single(templates, tmp_path) -> Path:
    return shutil.copytree(templates["single"], tmp_path / "single")


@pytest.fixture
def multi(templates, tmp_path) -> Path:
    return shutil.copytree(templates["multi"], tmp_path / "multi")
