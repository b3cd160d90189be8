"""Earlier lessons that come back in a later job: at growing distances, a few variants each."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from apollo_curation.teach.variants import Asked
from apollo_curation.teach.written import stored_lesson
from apollo_ipc.teaching.lessons import StoredLesson

FIRST_VARIANTS = 8  # of a lesson when it comes back for the first time; half of it each time after
LEAST_VARIANTS = 2
MAX_LESSONS = 40  # in one job


def due(lessons: Sequence[StoredLesson]) -> list[StoredLesson]:
    """Those that come back now, of all in the order in which they were taught. A lesson that has come back
    n times waits for 2^n - 1 jobs in between; the ones that were missed in the last examination first."""
    jobs = list(dict.fromkeys(one.job for one in lessons))
    age = {job: len(jobs) - at for at, job in enumerate(jobs)}  # 1: the last job
    found = [one for one in lessons if age[one.job] >= 2**one.rehearsed]
    return sorted(found, key=lambda one: (one.is_known, one.rehearsed))[:MAX_LESSONS]


def rehearsed(
    lessons: Sequence[StoredLesson], rng: random.Random, forms: Callable[[str], bytes] = lambda lesson: b""
) -> list[Asked]:
    """forms: of a lesson by its id, as the store has them."""
    again = []
    for at, one in enumerate(lessons):
        lesson = stored_lesson(one.fact, at, forms(one.id))
        number = max(LEAST_VARIANTS, FIRST_VARIANTS >> one.rehearsed)
        pools = (lesson.forward, lesson.backward)
        for pool, some in zip(pools, (number - number // 3, number // 3), strict=True):
            again += rng.sample(pool, min(some, len(pool)))
    return again
