"""What is left of a hundred facts that were taught in twenty jobs, with and without lessons that come back.

As learning.py, in one process with the product's own material and rehearsal; after every few jobs all
facts so far are asked, in their own words and in the forms of the product's examination.

    python benchmarks/learning_sequence.py --json sequence.json --picture sequence.svg
    python benchmarks/learning_sequence.py --rehearsal without --jobs 10
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import learning_data as data
import msgspec
from learning import Before, add_model_options, learned_kl, opened, say, settings

from apollo_curation.teach import examine
from apollo_curation.teach.job import Mix, general_prompts, own_answers, prompts_beside, request_of, taught
from apollo_curation.teach.rehearsal import due, rehearsed
from apollo_curation.teach.variants import Lesson, lesson_of
from apollo_ipc.teaching.facts import Fact, whole
from apollo_ipc.teaching.lessons import StoredLesson
from apollo_ipc.words import is_in

if TYPE_CHECKING:
    from learning_model import OfflineModel


def main() -> int:
    options = parse_arguments()
    model, before = opened(options)
    runs = []
    for rehearsal in options.rehearsal:
        runs.append(run(model, before, options, is_rehearsed=rehearsal == "with"))
        if options.json:
            options.json.write_text(json.dumps(runs, indent=1))
    print_table(runs)
    if options.picture:
        draw(runs, options.picture)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--jobs", type=int, default=20)
    add("--facts", type=int, default=5, help="of a job (%(default)s)")
    add("--every", type=int, default=5, help="jobs between two examinations of all facts (%(default)s)")
    add("--rehearsal", nargs="+", choices=["with", "without"], default=["with", "without"])
    add("--mix", type=settings, default={}, help="fields of Mix, as kl_weight=3,lr=2e-4")
    add("--seed", type=int, default=0)
    add_model_options(parser)
    add("--json", type=Path, metavar="FILE")
    add("--picture", type=Path, metavar="FILE", help="what is known by age, and the KL, as SVG or PNG")
    return parser.parse_args()


def run(model: OfflineModel, before: Before, options: Any, *, is_rehearsed: bool) -> dict[str, Any]:
    mix = msgspec.convert({k: v for k, v in options.mix.items() if k != "_"}, Mix) if options.mix else Mix()
    facts = random.Random(options.seed).sample(data.sequence(), options.jobs * options.facts)
    model.reset(options.seed)
    lessons: list[StoredLesson] = []
    looks, kls, tokens, started = [], [], 0, time.monotonic()
    for number in range(options.jobs):
        new = [whole(Fact(q, a)) for q, a in facts[number * options.facts :][: options.facts]]
        made = [lesson_of(fact, at) for at, fact in enumerate(new)]
        seed = options.seed * 1000 + number
        again = due(lessons) if is_rehearsed else []
        general, near = prompts_beside(made, general_prompts(), mix, seed)
        examples = taught(made, mix, rehearsed(again, random.Random(seed)))
        tokens += model.train(
            request_of(examples, own_answers(model, general), own_answers(model, near), mix, seed)
        )
        back = {one.id for one in again}
        lessons = [
            msgspec.structs.replace(one, rehearsed=one.rehearsed + (one.id in back)) for one in lessons
        ]
        lessons += [
            StoredLesson(f"{number}-{at}", str(number), 0.0, fact, "", 0, True, 0.0)
            for at, fact in enumerate(new)
        ]
        kls.append(round(learned_kl(model, before), 3))
        if (number + 1) % options.every == 0 or number + 1 == options.jobs:
            looks.append(look(model, lessons, number))
        say(json.dumps({"job": number + 1, "kl": kls[-1], "known": looks[-1]["known"] if looks else None}))
    return {
        "name": "with rehearsal" if is_rehearsed else "without rehearsal",
        "jobs": options.jobs, "facts": len(facts), "looks": looks, "kl": kls, "tokens": tokens,
        "english": round(model.text_loss(data.english()) - before.english, 3),
        "general": general_right(model, before), "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def look(model: OfflineModel, lessons: list[StoredLesson], number: int) -> dict[str, Any]:
    """Shares of own questions and of the examination that are right, by the job in which they were taught."""
    made: list[Lesson] = [lesson_of(one.fact) for one in lessons]
    said = examine.answers(model, made)
    found = [examine.examined(lesson, said, said) for lesson in made]
    by_job: dict[int, list[float]] = {}
    for one, result in zip(lessons, found, strict=True):
        by_job.setdefault(number - int(one.job), []).append(float(result.taught.is_right))
    return {
        "after_jobs": number + 1,
        "known": round(sum(one.taught.is_right for one in found) / len(found), 3),
        "examined": round(examine.share_known(found), 3),
        "by_age": {age: sum(values) / len(values) for age, values in sorted(by_job.items())},
    }


def general_right(model: OfflineModel, before: Before) -> list[int]:
    said = model.say([one.text for one in before.general], max_tokens=examine.SAID_TOKENS)
    right = [is_in(one.key, text) for one, text in zip(before.general, said, strict=True)]
    return [sum(right), len(right)]


def print_table(runs: list[dict[str, Any]]) -> None:
    print("| run | facts | known at the end | examination | general | KL | English | tokens | s |")
    print("|" + "---|" * 9)
    for one in runs:
        last, general = one["looks"][-1], one["general"]
        cells = (
            *(one["name"], f"{one['facts']} in {one['jobs']} jobs"),
            *(f"{last['known']:.0%}", f"{last['examined']:.0%}", f"{general[0]}/{general[1]}"),
            *(one["kl"][-1], f"{one['english']:+}", one["tokens"], one["seconds"]),
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (known, kl) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for one in runs:
        ages = one["looks"][-1]["by_age"]
        known.plot(
            [int(age) for age in ages], [100 * value for value in ages.values()], ".-", label=one["name"]
        )
        kl.plot(range(1, one["jobs"] + 1), one["kl"], label=one["name"])
    known.set(xlabel="jobs since it was taught", ylabel="own question right, %", ylim=(0, 103))
    kl.set(xlabel="jobs", ylabel="KL of general answers, nats a token", ylim=(0, None))
    known.legend()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
