"""Preferences by hand: the served model learns to do without the word "the", from pairs that a script makes.

    python benchmarks/dpo.py [--epochs 2] [--json FILE]

Real vLLM serves the real model. Of six answers of equal length to a question the one with the fewest "the" is
chosen, the one with the most is rejected. Accuracy: on how many held-out pairs, sampled before any training,
the model gives the chosen answer the higher log-probability.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from functools import partial
from typing import Any

from by_hand import all_at_once, parser_of, run_served
from grpo import HELD_OUT, THINGS

from apollo_ipc.demo.served import ServedModel, user

MAX_TOKENS = 24
QUESTIONS = ("Tell me about {}.", "What comes to mind when you think of {}?")


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args(argv)
    figures = run_served("dpo", args, run)
    for when in ("before", "after"):
        one = figures[when]
        rights = f"accuracy {one['accuracy']:.1%} of {one['num_pairs']} held-out pairs"
        print(f"{when:7} {rights}, {one['num_the']:.2f} times 'the' in an answer")
    losses = figures["loss_history"]
    took = f"{figures['num_pairs']} pairs, {figures['duration_s']:.0f} s"
    print(f"{took}, loss {losses[0]:.4f} to {losses[-1]:.4f}")


def run(args: argparse.Namespace, served: ServedModel) -> dict[str, Any]:
    pairs, kept = [pairs_of(served, things) for things in (THINGS, HELD_OUT)]
    before, started = measured(served, kept), time.monotonic()
    options = {"lr": args.lr, "epochs": args.epochs, "beta": args.beta, "accumulate_steps": 4}
    job = served.post("/train?wait=true", {"examples": pairs, "options": options})
    return {
        "num_pairs": len(pairs),
        "duration_s": time.monotonic() - started,
        "loss_history": job["loss_history"],
        "before": before,
        "after": measured(served, kept),
        **options,
    }


def pairs_of(served: ServedModel, things: list[str]) -> list[dict[str, Any]]:
    found = []
    questions = [question.format(thing) for thing in things for question in QUESTIONS]
    for said in all_at_once(partial(ask, served, num=6), questions):
        cut = [one for one in said["choices"] if len(one["token_ids"]) == MAX_TOKENS]
        answers = sorted(cut, key=num_the_of)
        if answers and num_the_of(answers[0]) < num_the_of(answers[-1]):
            pair = {"chosen": answers[0]["token_ids"], "rejected": answers[-1]["token_ids"]}
            found.append({"context_ids": said["prompt_token_ids"], **pair})
    return found


def num_the_of(choice: dict[str, Any]) -> int:
    return num_the(choice["message"]["content"])


def num_the(text: str) -> int:
    return len(re.findall(r"\bthe\b", text.lower()))


def ask(served: ServedModel, question: str, *, num: int) -> dict[str, Any]:
    body = {
        "model": served.model, "messages": user(question), "n": num, "max_tokens": MAX_TOKENS,
        "temperature": 1.0, "return_token_ids": True,
    }  # fmt: skip
    return served.post("/v1/chat/completions", body)


def measured(served: ServedModel, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    right = [
        logprob(served, pair["context_ids"], pair["chosen"])
        > logprob(served, pair["context_ids"], pair["rejected"])
        for pair in pairs
    ]
    asked = all_at_once(partial(ask, served, num=4), [QUESTIONS[0].format(thing) for thing in HELD_OUT])
    answers = [one["message"]["content"] for said in asked for one in said["choices"]]
    return {
        "accuracy": statistics.fmean(right),
        "num_pairs": len(pairs),
        "num_the": statistics.fmean(map(num_the, answers)),
        "num_answers": len(answers),
        "some": answers[::4],
    }


def logprob(served: ServedModel, context: list[int], answer: list[int]) -> float:
    body = {"model": served.model, "prompt": [*context, *answer], "max_tokens": 1, "prompt_logprobs": 0}
    rows = served.post("/v1/completions", body)["choices"][0]["prompt_logprobs"][len(context) :]
    return sum(row[str(token)]["logprob"] for row, token in zip(rows, answer, strict=True))


if __name__ == "__main__":
    main()
