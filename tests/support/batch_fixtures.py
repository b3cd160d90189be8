"""Moments and configurations for the tests of training, and for the children that they kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from apollo_curation.logs.conversation import Origin
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.settings import Curation, CurationConfig
from apollo_curation.store import Store, store_path
from apollo_ipc.config import Http, Paths
from apollo_ipc.wire.requests import Message

NUM_MOMENTS = 3


def config_in(
    directory: Path, url: str = "http://127.0.0.1:1", *, hold: int = 0, **curation: Any
) -> CurationConfig:
    """hold: of every tier, in updates that hold all of a batch."""
    settings = {"url": url, "patience_s": 10.0, **curation}
    config = CurationConfig(
        paths=Paths(str(directory), str(directory)), http=Http(train_key="key"), curation=Curation(**settings)
    )
    return holding(config, hold, examples_per_update=100)


def holding(config: CurationConfig, hold: int, **tier: Any) -> CurationConfig:
    """tier: other settings of every tier."""
    tiers = {
        name: msgspec.structs.replace(getattr(config, name), hold=hold, **tier)
        for name in ("tier_direct", "tier_dream", "tier_bootstrap")
    }
    return msgspec.structs.replace(config, **tiers)


def moment(answer: str | None, **changes: Any) -> Moment:
    facts: dict[str, Any] = {
        "kind": "correction",
        "tier": "direct",
        "context": [Message("user", f"Question before {answer}?")],
        "answer": None if answer is None else Message("assistant", answer),
        "source": Origin("log.jsonl", 1, 0),
        "topic": "colours",
        "reason": "the user corrected it",
        "confidence": 0.9,
        "state": "approved",
    }
    return Moment(**{**facts, **changes})


def add(config: CurationConfig, *answers: str, **changes: Any) -> list[Moment]:
    with Store(store_path(config)) as store:
        return Moments(store).add([moment(answer, **changes) for answer in answers])
