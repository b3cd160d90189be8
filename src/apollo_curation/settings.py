"""The sections of the configuration that are about training data: [curation], [judge], [dream], [quality] and
the three tiers. pyproject.toml names them to apollo_ipc, which leaves them to us."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_ipc.config import Config, Fraction, Positive, load_config
from apollo_ipc.errors import UserError

Count = Annotated[int, Meta(ge=1)]

TierName = Literal["direct", "dream", "bootstrap"]
When = Literal["continuous", "idle", "nightly"]

# Asked of the judge about each flagged moment; what it answers is JSON by a schema (judge.py).
DEFAULT_RUBRIC = """\
You review moments from an assistant's day. You see the conversation up to a decision, what the assistant
said there, what happened next, and why the moment was noticed. Decide whether the assistant would serve
people better if it learned from this moment, and what it should have said.
Worth learning: a correction that is right, a mistake and how it was mended, something that clearly helped,
a refusal of a harmless request. Not worth learning: facts of one day, private data, an angry user who was
wrong, anything unsafe, and whatever you cannot judge from what you see."""


class StripRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to take out of a conversation before it is trained; exactly one kind in a rule.

    role: whole messages of this role; begin + end: from marker to marker, both included, in any message;
    pattern: what a regular expression matches (dot matches newlines); json_path: parts of the record as it
    was read (RFC 9535), e.g. `$.memory`, `$.messages[?@.name == 'recall']`.
    """

    role: str | None = None
    begin: str | None = None
    end: str | None = None
    pattern: str | None = None
    json_path: str | None = None


# Instructions, and what programs put into the user's mouth or behind a tool's result.
INJECTED = (
    "system-reminder",
    "environment_context",
    "user_instructions",
    "user-prompt-submit-hook",
    "task-notification",
)
DEFAULT_STRIP = (
    StripRule(role="system"),
    StripRule(role="developer"),
    *(StripRule(begin=f"<{tag}>", end=f"</{tag}>") for tag in INJECTED),
)


class Curation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where experience comes from, which server learns from it, and how much of it."""

    sources: list[str] = []  # transcripts and agent logs: files, and directories of them
    bootstrap: list[str] = []  # logs that already show the wanted behaviour: every answer is learned
    url: str = "http://127.0.0.1:8000"  # the served model that learns
    model: str = ""  # empty: the one that it serves
    api_key: str = ""  # vLLM's --api-key, where it has one
    strip: list[StripRule] = msgspec.field(default_factory=lambda: list(DEFAULT_STRIP))
    max_record_bytes: Count = 16 * 1024 * 1024  # a longer line is counted and passed over
    auto_confidence: Fraction = 0.8  # `--auto` approves from here on
    min_surprise: Annotated[float, Meta(ge=0)] = 0.0  # nats a token: an answer that is likelier is known
    window_s: Positive = 86400.0
    max_examples_per_window: Count = 200
    max_source_share: Fraction = 0.5  # of one job, from one file
    max_topic_share: Fraction = 0.5  # of one job, of one topic
    near_duplicate: Fraction = 0.85  # Jaccard similarity of word triples from which two examples are one
    idle_s: Positive = 30.0  # so long nobody may have asked before an idle tier trains
    patience_s: Annotated[float, Meta(ge=0)] = 300.0  # how long a server that is away is waited for


class Judge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who judges flagged moments and dreams; by default the served model itself."""

    enabled: bool = True
    url: str = ""  # an OpenAI-compatible server; empty: curation.url
    model: str = ""
    api_key: str = ""
    rubric: str = DEFAULT_RUBRIC
    max_tokens: Count = 768
    num_parallel: Count = 4  # requests at a time


class Dreaming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Situations made from seeds, until a pattern holds."""

    seeds: list[str] = []  # text files and JSONL: reflections, lessons, memories
    num_variations: Count = 3  # a pattern holds when so many novel variations are answered well
    max_rounds: Count = 5  # of training on one seed
    max_seeds: Count = 20  # a night
    max_dreams: Count = 200  # a night
    max_seconds: Positive = 3600.0
    max_tokens: Count = 512
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.8


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must not get worse while the model learns."""

    enabled: bool = True
    heldout: str = ""  # JSONL of examples that are never trained, each with a `category`
    canaries: str = ""  # TOML of prompts and what a right answer looks like
    max_loss_increase: Positive = 0.05  # of a category's loss per token, relative to before
    max_canaries_lost: Annotated[int, Meta(ge=0)] = 0  # canaries that passed before and now fail
    check_interval_s: Positive = 30.0  # while a bulk job trains
    on_breach: Literal["stop", "restore"] = "stop"  # restore: and the last good version comes back live
    max_tokens: Count = 128  # of a canary's answer


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the examples of one tier are trained; these are the defaults of `bootstrap`, logs that already show
    the wanted behaviour."""

    lr: Annotated[float, Meta(gt=0, le=0.1)] = 1e-5
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    schedule: Literal["auto", "constant", "cosine"] = "auto"
    when: When = "nightly"
    max_examples: Count = 1000  # a job
    hold: Annotated[int, Meta(ge=0, le=64)] = 1  # of the model's own answers in each update, kept by KL
    examples_per_update: Count = 4  # beside them; with hold = 0 the worker's train.accumulate_steps


class DirectTier(Tier, frozen=True, forbid_unknown_fields=True):
    """What was just said, until it is known: measured with five facts (docs/apollo.md, Learning rates)."""

    lr: Annotated[float, Meta(gt=0, le=0.1)] = 1e-4
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 4
    schedule: Literal["auto", "constant", "cosine"] = "constant"
    when: When = "idle"
    max_examples: Count = 16
    examples_per_update: Count = 1  # as the rate was measured: larger updates are fewer, and teach less


class DreamTier(Tier, frozen=True, forbid_unknown_fields=True):
    lr: Annotated[float, Meta(gt=0, le=0.1)] = 2e-5
    examples_per_update: Count = 1  # of few examples, so that a job has more updates than the first


class CurationConfig(Config, frozen=True, forbid_unknown_fields=True):
    """The whole file: what concerns worker and server, and our own sections."""

    curation: Curation = Curation()
    judge: Judge = Judge()
    dream: Dreaming = Dreaming()
    quality: Quality = Quality()
    tier_direct: DirectTier = DirectTier()
    tier_dream: DreamTier = DreamTier()
    tier_bootstrap: Tier = Tier()

    def check(self) -> None:
        super().check()
        check_strip_rules(self.curation.strip)

    def tier(self, name: TierName) -> Tier:
        return getattr(self, f"tier_{name}")


def load_curation_config(
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> CurationConfig:
    """As apollo_ipc.config.load_config, with our sections."""
    return load_config(file, overrides, environ, kind=CurationConfig)


def check_strip_rules(rules: list[StripRule]) -> None:
    """Raises UserError naming the rule that says nothing, two things, or something that cannot be read."""
    for i, rule in enumerate(rules):
        field = f"curation.strip[{i}]"
        kinds = [rule.role, rule.begin or rule.end, rule.pattern, rule.json_path]
        if sum(kind is not None for kind in kinds) != 1:
            raise UserError("a rule has exactly one of role, begin + end, pattern, json_path", field=field)
        if (rule.begin is None) != (rule.end is None) or rule.begin == "" or rule.end == "":
            raise UserError("begin and end go together, and neither is empty", field=field)
        if rule.role in ("user", "assistant", "tool"):
            raise UserError(
                f"the {rule.role}'s messages are what is learned from; name system, developer or a role of "
                "your own",
                field=f"{field}.role",
            )
        if rule.pattern is not None:
            try:
                matches_nothing = re.compile(rule.pattern).search("")
            except re.error as error:
                raise UserError(f"not a regular expression: {error}", field=f"{field}.pattern") from None
            if matches_nothing:
                raise UserError("matches the empty text", field=f"{field}.pattern")
