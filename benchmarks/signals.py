"""What the rules that notice moments find in a stream with planted ones: precision and recall by kind.

    python benchmarks/signals.py [--part all|first|second] [--seeds 5] [--json FILE]

Each seed is a stream of 400 turns with 40 planted moments among hard negatives (benchmarks/planted.py).
A moment counts as found where kind and decision are the planted ones. `answer`: of the found ones, how many
came with the answer that should be learned, were left to the judge though the conversation holds one, and
came with a wrong one. Needs no model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

KINDS = ("correction", "error_then_fix", "praise", "wrong_refusal")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("all", "first", "second"), default="all", help="which stories")
    parser.add_argument("--seeds", type=int, default=5, help="how many streams")
    parser.add_argument("--misses", action="store_true", help="print what was missed or wrongly flagged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    args = parser.parse_args()
    figures = measure(args.part, args.seeds)
    show(figures)
    if args.misses:
        print("\n".join(figures["misses"]))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(part: str, num_seeds: int) -> dict:
    """Sums over the seeds, and precision and recall of them, by kind and of all."""
    import planted

    from apollo_curation.moments.signals import flag
    from apollo_curation.settings import StripRule

    rules = [StripRule(role="system"), StripRule(role="developer")]
    counts = {kind: Counter() for kind in KINDS}
    traps: Counter[str] = Counter()
    misses: dict[str, None] = {}
    num_turns, duration_s = 0, 0.0
    for seed in range(num_seeds):
        stream = planted.stream(seed, part=part)  # pyright: ignore[reportArgumentType]
        num_turns += planted.num_turns(stream)
        for one in stream:
            started = time.perf_counter()
            moments = flag(one.conversation, rules, 8)
            duration_s += time.perf_counter() - started
            left = list(moments)
            for label in one.labels:
                own = counts[label.kind]
                own["planted"] += 1
                found = next((m for m in left if planted.is_label_of(label, one, m)), None)
                if found is None:
                    misses[f"missed {label.kind}: {_story(one, label.at)}"] = None
                    continue
                left.remove(found)
                own["found"] += 1
                if planted.is_right_answer(label, found.answer):
                    own["answer_right"] += 1
                elif found.answer is None:
                    own["answer_left_to_judge"] += 1
                else:
                    own["answer_wrong"] += 1
                    misses[f"wrong answer: {found.answer.content!r} {_story(one, label.at)}"] = None
            for moment in left:
                counts[moment.kind]["false"] += 1
                traps[one.trap or "other"] += 1
                decided = moment.original or moment.answer
                assert decided is not None
                misses[f"false {moment.kind} ({one.trap}): {decided.content!r} {moment.reason}"] = None
    rows = [_row(kind, counts[kind]) for kind in KINDS]
    rows.append(_row("all", sum(counts.values(), Counter())))
    return {
        "part": part,
        "seeds": num_seeds,
        "turns": num_turns,
        "turns_per_s": num_turns / duration_s,
        "rows": rows,
        "false_by_trap": dict(traps),
        "misses": list(misses),
    }


def _row(kind: str, own: Counter[str]) -> dict:
    flagged = own["found"] + own["false"]
    return {
        "kind": kind,
        "planted": own["planted"],
        "flagged": flagged,
        "found": own["found"],
        "precision": own["found"] / flagged if flagged else None,
        "recall": own["found"] / own["planted"] if own["planted"] else None,
        "answer_right": own["answer_right"],
        "answer_left_to_judge": own["answer_left_to_judge"],
        "answer_wrong": own["answer_wrong"],
    }


def _story(one, at: int) -> str:
    return " | ".join(message.content for message in one.conversation.messages[at : at + 3])


def show(figures: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"Rules on planted moments: stories `{figures['part']}`, {figures['turns']} turns"
    table = Table(title=title)
    columns = (
        "kind",
        "planted",
        "flagged",
        "found",
        "precision",
        "recall",
        "answer right",
        "to judge",
        "wrong",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for row in figures["rows"]:
        shares = ["-" if row[q] is None else f"{row[q]:.1%}" for q in ("precision", "recall")]
        answers = [str(row[f"answer_{q}"]) for q in ("right", "left_to_judge", "wrong")]
        table.add_row(row["kind"], *(str(row[q]) for q in ("planted", "flagged", "found")), *shares, *answers)
    console = Console(width=120)
    console.print(table)
    traps = ", ".join(f"{name} {n}" for name, n in sorted(figures["false_by_trap"].items())) or "none"
    console.print(f"wrongly flagged, by what they look like: {traps}")
    console.print(f"{figures['turns_per_s']:,.0f} turns a second")


if __name__ == "__main__":
    main()
