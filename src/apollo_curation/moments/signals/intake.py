"""Conversations in, moments kept: what of a log is new becomes flagged moments, each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from apollo_curation.logs.conversation import Broken
from apollo_curation.logs.follow import Follower, Record
from apollo_curation.logs.strip import Stripped, strip
from apollo_curation.moments.moments import Moment, Moments, identify
from apollo_curation.moments.segments import SEGMENT_MESSAGES
from apollo_curation.moments.signals import flag_stripped
from apollo_curation.settings import Curation
from apollo_curation.store import Store
from apollo_ipc.errors import UserError

Find = Callable[[Stripped, int], list[Moment]]  # the moments of a conversation; how long their context is


class Taken:
    """What was made of records so far. broken, problems: by reason, of records and of conversations that
    cannot be stripped; lost: by name, what readers left out; passed_over: by ending, files not opened;
    num_known: moments that had been noticed before; num_improved: of these, such as have an answer only now.
    """

    def __init__(self) -> None:
        self.num_conversations = 0
        self.num_known = 0
        self.num_improved = 0
        self.added: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()
        self.first_broken: dict[str, Broken] = {}

    def as_data(self) -> dict[str, object]:
        return {
            "num_conversations": self.num_conversations,
            "num_added": self.added.total(),
            "added": dict(self.added.most_common()),
            "num_known": self.num_known,
            "num_improved": self.num_improved,
            "broken": dict(self.broken.most_common()),
            "problems": dict(self.problems.most_common()),
            "lost": dict(self.lost.most_common()),
            "passed_over": dict(self.passed_over.most_common()),
            "first_broken": list(self.first_broken.values()),
        }


def take_new(
    store: Store,
    moments: Moments,
    follower: Follower,
    settings: Curation,
    taken: Taken | None = None,
    stop: Callable[[], bool] = lambda: False,
    find: Find = flag_stripped,
) -> Taken:
    """All that is new for the follower. Moments and how far was read are kept together: after a crash no
    record is lost. stop: asked between batches; find: what makes moments of a conversation."""
    taken = taken or Taken()
    for batch in follower.batches():
        with store.transaction():
            take(moments, batch.records, settings, taken, find)
            follower.save(batch)
        if stop():
            break
    taken.passed_over = follower.passed_over
    return taken


def take(
    moments: Moments,
    records: Iterable[Record],
    settings: Curation,
    taken: Taken,
    find: Find = flag_stripped,
) -> None:
    for record in records:
        taken.lost.update(record.lost)
        if isinstance(record, Broken):
            taken.broken[record.reason] += 1
            taken.first_broken.setdefault(record.reason, record)
            continue
        taken.num_conversations += 1
        stripped = strip(record, settings.strip)
        if stripped.problem:
            taken.problems[stripped.problem] += 1
            continue
        if noticed := find(stripped, SEGMENT_MESSAGES):
            keep(moments, noticed, taken)


def keep(moments: Moments, noticed: list[Moment], taken: Taken) -> None:
    """A log may hold a conversation again and again as it grows: a moment that nobody has looked at yet is
    replaced once its better answer, or more evidence, is there."""
    added = moments.add(noticed)
    taken.added.update(moment.kind for moment in added)
    new = {moment.moment_id for moment in added}
    for moment in noticed:
        moment_id = identify(moment)
        if moment_id in new:
            continue
        taken.num_known += 1
        known = moments.get(moment_id)
        if not known.num_judged and _is_better(moment, known):
            changes = {
                name: getattr(moment, name) for name in ("answer", "aftermath", "reason", "confidence")
            }
            if moment.answer != known.answer:
                changes["surprise"] = None
            try:
                moments.change(moment_id, expected=["flagged"], **changes)
            except UserError:
                continue  # decided, by whomever
            taken.num_improved += 1


def _is_better(moment: Moment, known: Moment) -> bool:
    if (moment.answer is None) != (known.answer is None):
        return moment.answer is not None
    return moment.confidence > known.confidence
