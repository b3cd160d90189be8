"""What the real model knows after it was taught, and what else has moved.

Facts that nobody knows are taught to SmolLM2-135M-Instruct in one process by the worker's own optimizer and
loss; material, rounds and examination are the product's (apollo_curation.teach). Each fact has four
paraphrased questions, one backwards, and two near misses that must not get its answer, none of which is
trained.

    python benchmarks/learning.py --methods train teach --facts 10 --seeds 0 --json learning.json
    python benchmarks/learning.py --methods teach --without near --mix kl_weight=3,lr=2e-4
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import learning_data as data
import msgspec
from learning_teacher import teach

from apollo_curation.teach.job import Mix, general_prompts, own_answers
from apollo_curation.teach.variants import lesson_of
from apollo_ipc.process.serving import worker_environment
from apollo_ipc.teaching.facts import Fact, whole
from apollo_ipc.wire.requests import Example, Message, TrainOptions, TrainRequest
from apollo_ipc.words import is_in

if TYPE_CHECKING:
    from learning_model import OfflineModel

METHODS = ("train", "teach", "adamw")
PARTS = ("variants", "backward", "replay", "near", "floor", "freeze")
PLAIN_VIEWS = 20  # of a fact by plain training: shared with what was measured before
ANSWER_TOKENS = 32
say = partial(print, file=sys.stderr, flush=True)


class Before(NamedTuple):
    """Of the model as it was: which general questions it answers, its own answers and their distributions."""

    general: list[data.Question]
    own: list[Any]
    distributions: list[Any]
    english: float


def main() -> int:
    options = parse_arguments()
    model, before = opened(options)
    rows = []
    for method in options.methods:
        for mix in options.mix or [{}]:
            for seed in options.seeds:
                row = run(model, before, method, mix, seed, options)
                rows.append(row)
                say(json.dumps({k: v for k, v in row.items() if k != "answers"}))
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    print_table(rows)
    return 0


def opened(options: argparse.Namespace) -> tuple[OfflineModel, Before]:
    """By `add_model_options`."""
    os.environ.update(worker_environment(os.environ))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from learning_model import OfflineModel

    from apollo_ipc.demo.real_model import real_model

    torch.set_num_threads(options.threads)
    model = OfflineModel(options.model or real_model())
    before = look_before(model)
    say(f"general: {len(before.general)} of {len(data.general())} right before; English {before.english:.3f}")
    return model, before


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a directory instead of the real model's")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=["train", "teach"])
    add("--set", choices=data.SETS, default="first", help="of facts; the last one is for the end")
    add("--facts", type=int, default=10, help="of the set, as many of each kind (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="which facts, their order, and the rounding")
    add("--without", nargs="+", choices=PARTS, default=[], help="parts of teach to leave out")
    add(
        "--mix", type=settings, action="append", help="fields of Mix, as kl_weight=3,lr=2e-4; may be repeated"
    )
    add_model_options(parser)
    add("--json", type=Path, metavar="FILE", help="all figures, and what was answered")
    return parser.parse_args()


def settings(text: str) -> dict[str, Any]:
    pairs = dict(part.split("=", 1) for part in text.split(","))
    return msgspec.to_builtins(msgspec.convert(pairs, Mix, strict=False)) | {"_": text}


def look_before(model: OfflineModel) -> Before:
    questions = data.general()
    said = model.say([one.text for one in questions], max_tokens=ANSWER_TOKENS)
    right = [one for one, text in zip(questions, said, strict=True) if is_in(one.key, text)]
    own = own_answers(model, data.prompts())
    return Before(right, own, model.distributions(own), model.text_loss(data.english()))


def run(
    model: OfflineModel, before: Before, method: str, changed: dict[str, Any], seed: int, options: Any
) -> dict[str, Any]:
    facts = data.chosen(data.facts_of(options.set), options.facts, seed)
    mix = msgspec.convert({k: v for k, v in changed.items() if k != "_"}, Mix) if changed else Mix()
    without = options.without if method == "teach" else []
    model.reset(seed)
    check_held_out(facts)
    started, rounds = time.monotonic(), 1
    if method == "train":
        tokens = model.train(plain_request(facts, mix))
    elif method == "adamw":
        from learning_model import adamw

        tokens = model.train_with(plain_request(facts, mix), adamw)
    else:
        tokens, rounds = teach(model, [whole(Fact(f.taught.text, f.answer)) for f in facts], mix, without)
    seconds = time.monotonic() - started
    name = " ".join([method, *(f"-{part}" for part in without), changed.get("_", "")]).strip()
    row = {"name": name, "seed": seed, "set": options.set, "facts": len(facts)}
    row |= look_after(model, before, facts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row | {"tokens": tokens, "rounds": rounds, "seconds": round(seconds, 1), "peak_mb": round(peak)}


def plain_request(facts: list[data.BenchFact], mix: Mix) -> TrainRequest:
    """As a user of POST /train would: the question and its answer, again and again."""
    examples = [
        Example(messages=[Message("user", fact.taught.text), Message("assistant", fact.answer)])
        for fact in facts
    ]
    return TrainRequest(examples, TrainOptions(lr=mix.lr, epochs=PLAIN_VIEWS, accumulate_steps=mix.num_facts))


def check_held_out(facts: list[data.BenchFact]) -> None:
    """Nothing that is asked afterwards is trained."""
    lessons = [lesson_of(whole(Fact(f.taught.text, f.answer)), at) for at, f in enumerate(facts)]
    known = {asked.question for one in lessons for asked in (*one.forward, *one.backward)}
    known |= {question for one in lessons for question in one.near_misses} | set(general_prompts())
    asked = {q.text for f in facts for q in (*f.paraphrased, *f.reversed, *f.near)}
    asked |= {q.text for q in data.general()} | set(data.prompts())
    assert not known & asked, known & asked


def look_after(model: OfflineModel, before: Before, facts: list[data.BenchFact]) -> dict[str, Any]:
    groups = {
        "taught": [fact.taught for fact in facts],
        "paraphrased": [one for fact in facts for one in fact.paraphrased],
        "reversed": [one for fact in facts for one in fact.reversed],
        "near": [one for fact in facts for one in fact.near],
        "general": before.general,
    }
    questions = [(name, one) for name, group in groups.items() for one in group]
    said = model.say([one.text for _, one in questions], max_tokens=ANSWER_TOKENS)
    right = {name: [0, len(group)] for name, group in groups.items()}
    answers = []
    for (name, one), text in zip(questions, said, strict=True):
        is_right = is_in(one.key, text)
        right[name][0] += is_right
        answers.append([name, one.text, text, is_right])
    return {
        **right,
        "kl": round(learned_kl(model, before), 3),
        "english": round(model.text_loss(data.english()) - before.english, 3),
        "answers": answers,
    }


def learned_kl(model: OfflineModel, before: Before) -> float:
    from learning_model import kl

    return kl(before.distributions, model.distributions(before.own))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, with the least and the largest where there are several."""
    columns = ("taught", "paraphrased", "reversed", "near", "general", "kl", "english", "tokens", "seconds")
    print("| run | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name in dict.fromkeys(row["name"] for row in rows):
        some = [row for row in rows if row["name"] == name]
        cells = [_cell([row[column] for row in some]) for column in columns]
        print(f"| {name} ({some[0]['facts']} facts, {len(some)} seeds) | " + " | ".join(cells) + " |")


def _cell(values: list[Any]) -> str:
    if isinstance(values[0], list):
        total = sum(whole for _, whole in values)
        spread = f" ({min(n for n, _ in values)} to {max(n for n, _ in values)})" if len(values) > 1 else ""
        return f"{sum(n for n, _ in values)}/{total}{spread}"
    spread = f" ({min(values):g} to {max(values):g})" if len(values) > 1 else ""
    mean = statistics.fmean(values)
    return f"{mean:.0f}" if mean >= 1000 else f"{mean:.3g}{spread}"


if __name__ == "__main__":
    sys.exit(main())
