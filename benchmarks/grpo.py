"""Rewards by hand: the served model learns to answer in exactly five words, from a script that counts them.

    python benchmarks/grpo.py [--minutes 10] [--json FILE] [--plot FILE.png]

Real vLLM serves the real model. A round asks a few questions, eight answers each, scores them, and sends one
POST /train with the groups. Before and after, held-out questions are answered, and scored by the same script.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from by_hand import all_at_once, parser_of, run_served

from apollo_ipc.demo.served import ServedModel, user

THINGS = [
    "a harbour", "a bakery", "the moon", "a thunderstorm", "an old library", "a railway station", "a garden",
    "winter", "a violin", "a lighthouse", "a market", "the desert", "a good friend", "a bicycle", "a volcano",
    "a quiet evening", "a school", "the ocean", "a mountain path", "a kitchen", "a night train", "a cat",
    "an island", "a festival",
]  # fmt: skip
HELD_OUT = ["a river", "a castle", "autumn", "a dog", "a museum", "the sun", "a bridge", "a small town"]
ANSWERS, MAX_TOKENS = 8, 16


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--questions", type=int, default=4, help="of a round, which is one update")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--plot", type=Path, help="draw the curve to this .png (needs matplotlib)")
    args = parser.parse_args(argv)
    figures = run_served("grpo", args, run)
    for when in ("before", "after"):
        one = figures[when]
        print(f"{when:7} {one['five_words']:6.1%} of five words, reward {one['reward']:.3f}, held out")
    if args.plot:
        plot(figures, args.plot)


def run(args: argparse.Namespace, served: ServedModel) -> dict[str, Any]:
    before, rounds, started = held_out(served), [], time.monotonic()
    while time.monotonic() - started < 60 * args.minutes:
        at = len(rounds) * args.questions
        things = [THINGS[(at + i) % len(THINGS)] for i in range(args.questions)]
        groups = all_at_once(partial(group_of, served), things)
        rewards = [one["reward"] for group in groups for one in group["completions"]]
        options = {"lr": args.lr, "accumulate_steps": args.questions, "schedule": "constant"}
        job = served.post("/train?wait=true", {"examples": groups, "options": options})
        rounds.append(
            {
                "at_s": time.monotonic() - started,
                "reward": statistics.fmean(rewards),
                "five_words": statistics.fmean(reward == 1.0 for reward in rewards),
                "job_id": job["job_id"],
                "notes": job["notes"],
            }
        )
        print(f"{rounds[-1]['at_s']:5.0f} s  reward {rounds[-1]['reward']:.3f}  "
              f"five words {rounds[-1]['five_words']:.0%}", flush=True)  # fmt: skip
    return {"before": before, "rounds": rounds, "after": held_out(served), "lr": args.lr}


def group_of(served: ServedModel, thing: str) -> dict[str, Any]:
    """As POST /train takes it: the very tokens that were sampled, what each was given, and the reward."""
    said = sampled(served, thing)
    return {
        "context_ids": said["prompt_token_ids"],
        "completions": [
            {
                "ids": one["token_ids"],
                "logprobs": [token["logprob"] for token in one["logprobs"]["content"]],
                "reward": reward(one["message"]["content"]),
            }
            for one in said["choices"]
        ],
    }


def sampled(served: ServedModel, thing: str) -> dict[str, Any]:
    body = {
        "model": served.model, "messages": user(f"Describe {thing} in exactly five words."), "n": ANSWERS,
        "max_tokens": MAX_TOKENS, "temperature": 1.0, "logprobs": True, "return_token_ids": True,
    }  # fmt: skip
    return served.post("/v1/chat/completions", body)


def reward(answer: str) -> float:
    """1 for five words; of others the nearer ones have a little more: a group of zeros teaches nothing."""
    away = abs(len(answer.split()) - 5)
    return 1.0 if away == 0 else 0.4 * (1.0 - min(away, 5) / 5)


def held_out(served: ServedModel) -> dict[str, Any]:
    asked = all_at_once(partial(sampled, served), HELD_OUT)
    answers = [one["message"]["content"] for said in asked for one in said["choices"]]
    rewards = [reward(answer) for answer in answers]
    return {
        "reward": statistics.fmean(rewards),
        "five_words": statistics.fmean(value == 1.0 for value in rewards),
        "num_answers": len(answers),
        "some": answers[::8],
    }


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    minutes = [one["at_s"] / 60 for one in figures["rounds"]]
    lines = (("five_words", "exactly five words", "#0072B2"), ("reward", "reward", "#E69F00"))
    for name, label, color in lines:
        axis.plot(minutes, [one[name] for one in figures["rounds"]], label=label, color=color)
        ends = [figures["before"][name], figures["after"][name]]
        axis.plot([0, minutes[-1]], ends, "o", color=color, label=f"{label}, held out")
    axis.set(
        xlabel="minutes", ylabel="mean of a round", ylim=(0, 1), title="GRPO on the served model, two cores"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    main()
