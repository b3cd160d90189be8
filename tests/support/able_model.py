"""The model of the nights, made once for all runs: minutes of computing."""

from __future__ import annotations

from pathlib import Path

from made_once import MadeOnce

from apollo_curation.demo import night_corpus, night_model
from apollo_ipc.demo import models

SOURCES = [Path(module.__file__) for module in (models, night_corpus, night_model)]
NAME = "able"


def path(once: MadeOnce) -> Path:
    return once.path(NAME, SOURCES)


def make(once: MadeOnce) -> Path:
    return once.directory(night_model.make_able_model, NAME, SOURCES)
