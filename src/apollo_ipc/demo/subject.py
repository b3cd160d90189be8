"""Who is taught in the demonstration: the real language model, or a tiny random one, and with what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apollo_ipc.demo.lessons import DO_NOT_KNOW, GENERAL, HARBOUR, MANNERS, TEAM, DemoFact, General
from apollo_ipc.demo.real_model import NAME, copy_real_model, real_model
from apollo_ipc.demo.served import chat, say
from apollo_ipc.process.progress import progress
from apollo_ipc.process.serving import ServerFailed, worker_environment


class Subject(NamedTuple):
    """options: of a round's job by POST /train; None: taught by POST /teach. make: writes the model to the
    directory given."""

    name: str
    arch: str
    facts: Sequence[DemoFact]
    general: Sequence[General]
    options: dict[str, Any] | None
    make: Callable[[Path], Path]


def real_subject() -> Subject:
    """Raises NoRealModel where its package is not installed."""
    real_model()
    return Subject(NAME, "llama", TEAM, GENERAL, None, copy_real_model)


def tiny_subject(arch: str) -> Subject:
    # A high rate, for a tiny model that shall learn in a minute; see docs/apollo.md for real ones.
    options = {"lr": 1e-3, "epochs": 6, "schedule": "constant"}
    name = f"a tiny random model of {arch}'s architecture"
    return Subject(name, arch, HARBOUR, [], options, lambda directory: _make_polite_model(directory, arch))


def _make_polite_model(model_dir: Path, arch: str) -> Path:
    """A random model that has been taught, by the offline trainer, to say that it does not know."""
    from apollo_ipc.demo.models import make_model

    make_model(model_dir, arch)
    lines = "\n".join(json.dumps(chat(question, DO_NOT_KNOW)) for question in MANNERS)
    command = [sys.executable, "-m", "apollo_ipc", "train", "-", "--offline", str(model_dir)]
    flags = ["--lr", "1e-3", "--epochs", "5", "--schedule", "constant", "--json"]
    say("Teaching it manners with the offline trainer, so that it can say that it does not know")
    environment = worker_environment(os.environ)
    with progress("training offline"):
        done = subprocess.run(
            [*command, *flags], input=lines, text=True, capture_output=True, env=environment
        )
    if done.returncode:
        raise ServerFailed(f"the offline trainer failed:\n{done.stderr[-2000:]}")
    return model_dir
