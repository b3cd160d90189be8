"""Which of the approved moments of a tier become the next job, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Literal

import msgspec

from apollo_curation.moments.moments import Moment, Moments, example_digest
from apollo_curation.settings import CurationConfig, TierName
from apollo_curation.store import Store
from apollo_curation.training.batch_table import BatchTable
from apollo_curation.training.near_duplicates import NearDuplicates
from apollo_curation.training.replay import request_bytes
from apollo_ipc.wire.requests import MAX_EXAMPLES

Reason = Literal[
    "no answer",  # nobody has proposed one yet
    "other loss",  # a job has one: the next one may have it
    "known already",  # the model would have said it anyway: curation.min_surprise
    "trained before",  # equal content is in the weights, or in a job under way
    "duplicate",  # of one that was chosen
    "near duplicate",  # of one that was chosen or trained lately
    "source share",  # curation.max_source_share
    "topic share",  # curation.max_topic_share
    "too large",  # for http.max_body_bytes, even alone
    "job full",  # the next job may have it
    "window budget",  # curation.max_examples_per_window
]

RECENT_WINDOWS = 7  # near duplicates are looked for among what so many windows have trained
BODY_SHARE = 0.8  # of http.max_body_bytes: others may write the same JSON longer than we do


class Choice(msgspec.Struct, frozen=True):
    """chosen: in the order in which they will be trained, mixed: moments of one kind in a row would let the
    last kind undo what the first ones taught. left: those that stay approved, by reason."""

    chosen: list[Moment]
    left: dict[Reason, list[Moment]]


class Places(msgspec.Struct, frozen=True):
    """What one job has room for. full: why no more, where num_examples are chosen."""

    num_examples: int
    num_of_source: int
    num_of_topic: int
    num_bytes: int
    full: Reason


def choose(
    approved: Iterable[Moment],
    store: Store,
    tier: TierName,
    config: CurationConfig,
    now: float,
    *,
    limit: int | None = None,
) -> Choice:
    """Those of `approved` that belong to `tier`, the most valuable first, as many as there are places.

    now: seconds since the epoch. The result depends on nothing but the arguments and the store.
    """
    places = count_places(store, tier, config, now, limit)
    table = BatchTable(store)
    candidates = by_value(moment for moment in approved if moment.tier == tier)
    recent = recently_trained(store, table, now - RECENT_WINDOWS * config.curation.window_s)
    near = NearDuplicates(config.curation.near_duplicate, [*recent, *candidates])
    for moment in recent:
        near.add(moment)

    chosen: list[Moment] = []
    left: dict[Reason, list[Moment]] = {}
    there = Moments(store).list("training", "trained")
    trained = {moment.digest for moment in there if moment.teaches or moment.forgotten}
    hashes = set[str]()
    num_of_source, num_of_topic = Counter[str](), Counter[str]()
    num_bytes = 0
    for moment in candidates:
        reason: Reason | None = None
        size, content = 0, ""
        if moment.teaches:
            example = moment.example()
            content = example_digest(example)
            size = request_bytes(example, None if moment.moves_away else config.tier(tier))
        if not moment.teaches:
            reason = "no answer"
        elif moment.surprise is not None and moment.surprise < config.curation.min_surprise:
            reason = "known already"
        elif content in trained:
            reason = "trained before"
        elif content in hashes:
            reason = "duplicate"
        elif size > places.num_bytes:
            reason = "too large"
        elif len(chosen) >= places.num_examples:
            reason = places.full
        elif num_bytes + size > places.num_bytes:
            reason = "job full"
        elif chosen and moment.moves_away != chosen[0].moves_away:
            reason = "other loss"
        elif num_of_source[moment.source.path] >= places.num_of_source:
            reason = "source share"
        elif num_of_topic[moment.topic] >= places.num_of_topic:
            reason = "topic share"
        elif near.find(moment) is not None:
            reason = "near duplicate"
        if reason is not None:
            left.setdefault(reason, []).append(moment)
            continue
        chosen.append(moment)
        hashes.add(content)
        near.add(moment)
        num_bytes += size
        num_of_source[moment.source.path] += 1
        num_of_topic[moment.topic] += 1
    return Choice(sorted(chosen, key=lambda moment: moment.moment_id), left)  # ids are hashes


def count_places(
    store: Store, tier: TierName, config: CurationConfig, now: float, limit: int | None
) -> Places:
    """The least of the tier's max_examples, `limit`, and what curation.max_examples_per_window leaves of the
    window that ends at `now`, in which examples of every tier count (Batch.num_trained).

    Of the places that there would be without `limit`, one file may take max_source_share and one topic
    max_topic_share, rounded down, but at least one. They are shares of the places, not of what is found for
    them: a lone small file is trained whole, and places that a share keeps free stay empty; the next job goes
    on.
    """
    own = config.curation
    budget = max(0, own.max_examples_per_window - BatchTable(store).num_trained(now - own.window_s))
    of_job = min(config.tier(tier).max_examples, MAX_EXAMPLES)
    shared = min(of_job, budget)
    asked_for = of_job if limit is None else min(of_job, limit)
    return Places(
        num_examples=min(asked_for, budget),
        num_of_source=max(1, int(own.max_source_share * shared)),
        num_of_topic=max(1, int(own.max_topic_share * shared)),
        num_bytes=int(BODY_SHARE * config.http.max_body_bytes),
        full="window budget" if budget < asked_for else "job full",
    )


def by_value(moments: Iterable[Moment]) -> list[Moment]:
    """The most valuable first; of equal value the oldest. Value: surprise times confidence, where a surprise
    that was not measured counts as the median of those that were."""
    moments = list(moments)
    measured = [moment.surprise for moment in moments if moment.surprise is not None]
    usual = median(measured) if measured else 1.0

    def order(moment: Moment) -> tuple[float, float, str]:
        surprise = usual if moment.surprise is None else moment.surprise
        return (-surprise * moment.confidence, moment.created_at, moment.moment_id)

    return sorted(moments, key=order)


def recently_trained(store: Store, table: BatchTable, since: float) -> list[Moment]:
    """Moments in the weights, or on their way there, of batches made at or after `since`."""
    kept = Moments(store)
    moments = [moment for batch in table.list(since) for moment in kept.of_batch(batch.batch_id)]
    return [one for one in moments if one.state in ("trained", "training") and not one.forgotten]
