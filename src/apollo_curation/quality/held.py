"""Where what training holds comes from: the served model's own answers, to held-out prompts too."""

from __future__ import annotations

from apollo_curation.chat_client import ChatClient
from apollo_curation.quality.heldout import heldout_examples
from apollo_curation.settings import CurationConfig
from apollo_curation.teach.served import ServedLearner
from apollo_curation.training.replay import Replay


def what_is_held(config: CurationConfig, model: ChatClient) -> Replay:
    """model: the one that learns."""
    return Replay(ServedLearner(model), lambda: heldout_examples(config.quality.heldout))
