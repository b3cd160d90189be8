"""Real chat templates x conversations: what is trained against what vLLM serves.

    python benchmarks/chat_templates.py [--templates DIR]... [--verbose] [--json FILE]

Takes every .jinja file of the installed packages and of the directories given, and tokenises each
conversation of benchmarks/chat_conversations.py with it. vLLM's own code (benchmarks/chat_oracle.py) judges
each cell: right, refused (of those: how many a plain rendering could have trained), or wrong. Needs vllm;
loads no model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from apollo_worker.jobs.tokenise import Tokeniser
from chat_conversations import CONVERSATIONS

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import parse_train_data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--templates", type=Path, action="append", default=[], help="directories with .jinja files"
    )
    parser.add_argument("--verbose", action="store_true", help="print each wrong and wrongly refused cell")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    figures = measure(find_templates(args.templates))
    if args.verbose:
        print(*figures["wrong_cells"], *figures["refusable_cells"], sep="\n")
    counts = figures["cells"]
    print(f"{figures['num_templates']} templates x {figures['num_conversations']} conversations")
    print("  ".join(f"{name} {count}" for name, count in counts.items()))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def find_templates(directories: list[Path]) -> dict[str, str]:
    """Name -> text, each text once."""
    files = [file for directory in directories for file in sorted(directory.rglob("*.jinja"))]
    for package in importlib.metadata.distributions():
        files += [Path(str(file.locate())) for file in package.files or [] if file.suffix == ".jinja"]
    found: dict[str, str] = {}
    for file in files:
        text = file.read_text() if file.exists() else ""
        if "messages" in text and text not in found.values():
            found[f"{file.parent.parent.name}/{file.name}"] = text
    return found


def measure(
    templates: dict[str, str], conversations: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Counts of cells: right, refused, refused_though_possible (of these), wrong; and what and where."""
    from chat_oracle import Oracle, could_be_trained, tokenizer_for

    conversations = conversations or CONVERSATIONS
    counts: Counter[str] = Counter(right=0, refused=0, refused_though_possible=0, wrong=0)
    wrong, refusable, by_template = [], [], {}
    for name, text in templates.items():
        served = tokenizer_for(text)
        oracle = Oracle(served, name)
        own: Counter[str] = Counter()
        for kind, body in conversations.items():
            outcome, reason = judge(served, oracle, body)
            own[outcome] += 1
            if outcome == "wrong":
                wrong.append(f"WRONG {name} | {kind}: {reason}")
            if outcome == "refused" and could_be_trained(oracle, served, body):
                own["refused_though_possible"] += 1
                refusable.append(f"REFUSED {name} | {kind}: {reason}")
        counts.update(own)
        by_template[name] = dict(own)
    return {
        "num_templates": len(templates),
        "num_conversations": len(conversations),
        "cells": dict(counts),
        "by_template": by_template,
        "wrong_cells": wrong,
        "refusable_cells": refusable,
    }


def judge(served: Any, oracle: Any, body: dict[str, Any]) -> tuple[str, str]:
    """("right" | "refused" | "wrong", why)."""
    from chat_oracle import faults

    tokeniser = Tokeniser(served, vocab_size=len(served.tokenizer), max_tokens=100_000)
    try:
        request = parse_train_data({"examples": [body]})
        sequences = tokeniser.encode(request.examples[0], "examples[0]")
    except UserError as error:
        return "refused", f"{error.field}: {error.message}"
    turns = {
        turn.message: (one.input_ids[: turn.start], one.input_ids[turn.start : turn.end])
        for one in sequences
        for turn in one.turns
        if turn.message is not None
    }
    found = faults(oracle, served, body, turns)
    return ("wrong", "; ".join(found)) if found else ("right", "")


if __name__ == "__main__":
    main()
