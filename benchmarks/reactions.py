"""What of people's reactions to answers is noticed, believed and kept: precision and recall of sieve,
hindsight, judge.

    python benchmarks/reactions.py [--misses] [--json FILE]                        # the rules alone, no model
    python benchmarks/reactions.py --url URL [--judge-url URL] [--state-dir DIR]   # the whole chain

The conversations: reactions_test.txt, and the half of planted_moments.txt and planted_traps.txt that no rule
was mended with. None is used for a threshold. A conversation counts as right where a moment of its kind is
found (correction, or refusal taken back, of what was spoken against; praise), or, of plain talk, none. 95 %
intervals by bootstrap over conversations. With a URL the served model is calibrated first, unless the state
directory knows it already.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_RESAMPLED = 1000
OUT_OF_REACH = "error_then_fix"  # rests on a tool's result, not on what anybody said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--samples", action="store_true", help="the calibration's own samples, to mend rules with"
    )
    parser.add_argument("--misses", action="store_true", help="print what was missed or wrongly flagged")
    parser.add_argument("--url", help="of the served model")
    parser.add_argument("--judge-url", help="of the judge [default: none is asked]")
    parser.add_argument("--judge-model", default="")
    parser.add_argument("--state-dir", type=Path, help="where calibration and verdicts are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    args = parser.parse_args()
    cases = of_samples() if args.samples else of_tests()
    figures: dict[str, Any] = {"conversations": len(cases), "rules": measure(cases, by_rules(cases))}
    show("rules alone", figures["rules"], args.misses)
    if args.url:
        with tempfile.TemporaryDirectory() as place:
            state_dir = args.state_dir or Path(place)
            for name, found in by_chain(cases, state_dir, args.url, args.judge_url, args.judge_model):
                if isinstance(found, str):
                    figures[name] = found
                    print(found)
                    continue
                figures[name] = measure(cases, found)
                show(name, figures[name], args.misses)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def of_samples() -> list[tuple[str, str, Any]]:
    from apollo_curation.moments.hindsight.samples import read_samples

    names = {"against": "correction", "for": "praise", "neither": "plain"}
    return [(names[one.label], one.language, conversation(one, i)) for i, one in enumerate(read_samples())]


def of_tests() -> list[tuple[str, str, Any]]:
    """(correction, praise or plain; language or what it looks like; conversation)."""
    import planted

    from apollo_curation.moments.hindsight.samples import read_samples

    cases = []
    for i, one in enumerate(read_samples(Path(__file__).with_name("reactions_test.txt"))):
        cases.append((one.label, one.language, conversation(one, i)))
    for file in ("planted_moments.txt", "planted_traps.txt"):
        stories = planted._of_part(planted._stories(file), "second")
        for number, story in enumerate(stories):
            if story.name == OUT_OF_REACH or "error" in story.name:
                continue
            one = planted._record([story], 3 * number + 1)
            kind = {"correction": "correction", "wrong_refusal": "correction", "praise": "praise"}
            cases.append((kind.get(story.name, "plain"), "planted", one.conversation))
    return cases


def conversation(sample: Any, number: int) -> Any:
    from apollo_curation.logs.conversation import Conversation, Origin
    from apollo_ipc.wire.requests import Message

    said = Message("user", sample.said_next)
    messages = [*sample.context, sample.answer, said, *sample.reply]
    return Conversation(messages, Origin("reactions.jsonl", number, 0), sample.language)


def by_rules(cases: list[tuple[str, str, Any]]) -> list[set[str]]:
    """Of each conversation the kinds that were noticed, as `measure` names them."""
    from apollo_curation.moments.signals import flag
    from apollo_curation.settings import DEFAULT_STRIP

    return [kinds(flag(one, list(DEFAULT_STRIP), 8)) for _, _, one in cases]


def kinds(moments: list[Any]) -> set[str]:
    names = {"correction": "correction", "wrong_refusal": "correction", "praise": "praise"}
    return {names[one.kind] for one in moments if one.kind in names}


def by_chain(
    cases: list[tuple[str, str, Any]], state_dir: Path, url: str, judge_url: str | None, judge_model: str
) -> Any:
    """Yields (name, what is left of each conversation) behind hindsight, and behind the judge."""
    from apollo_curation.chat_client import ChatClient
    from apollo_curation.moments.hindsight.calibration import Calibrations, describe
    from apollo_curation.moments.hindsight.score import look_back
    from apollo_curation.moments.judge import judge
    from apollo_curation.moments.moments import Moments
    from apollo_curation.moments.signals import flag
    from apollo_curation.settings import DEFAULT_STRIP, Judge
    from apollo_curation.store import Store

    state_dir.mkdir(parents=True, exist_ok=True)
    with Store(state_dir / "curation.sqlite") as store:
        table = Moments(store)
        for _, _, one in cases:
            table.add(flag(one, list(DEFAULT_STRIP), 8))

        def left() -> list[set[str]]:
            found: list[list[Any]] = [[] for _ in cases]
            for moment in table.list("flagged"):
                found[by_number[moment.source.number, moment.topic]].append(moment)
            return [kinds(moments) for moments in found]

        by_number = {(one.source.number, one.topic): i for i, (_, _, one) in enumerate(cases)}
        model = ChatClient(url)
        counts = look_back(store, model)
        calibration = Calibrations(store).of(model.model)
        yield "calibration", describe(calibration) if calibration else f"none: {counts.problem}"
        yield "rules, then hindsight", left()
        if judge_url:
            other = ChatClient(judge_url, judge_model)
            judged = judge(table, other, Judge())
            yield "judge", f"{judged.num_judged} verdicts, {judged.num_dropped} did not parse"
            yield "rules, hindsight, judge", left()


def measure(cases: list[tuple[str, str, Any]], found: list[set[str]]) -> dict[str, Any]:
    import numpy as np

    rows = {}
    rng = np.random.default_rng(0)
    for kind in ("correction", "praise", "both"):
        own = ("correction", "praise") if kind == "both" else (kind,)
        # Of each conversation: right, wrongly flagged, missed.
        marks = np.array(
            [
                [
                    sum(k == label and k in flagged for k in own),
                    sum(k != label and k in flagged for k in own),
                    sum(k == label and k not in flagged for k in own),
                ]
                for (label, _, _), flagged in zip(cases, found, strict=True)
            ]
        )
        draws = [marks[rng.integers(0, len(marks), len(marks))].sum(0) for _ in range(NUM_RESAMPLED)]
        row: dict[str, Any] = dict(zip(("right", "wrong", "missed"), map(int, marks.sum(0)), strict=True))
        row["precision"] = interval(marks.sum(0), draws, lambda m: m[0] / max(1, m[0] + m[1]))
        row["recall"] = interval(marks.sum(0), draws, lambda m: m[0] / max(1, m[0] + m[2]))
        rows[kind] = row
    by_language: dict[str, list[int]] = {}
    misses = []
    for (label, language, one), flagged in zip(cases, found, strict=True):
        right, wrong, missed = by_language.setdefault(language, [0, 0, 0])
        is_wrong, is_missed = bool(flagged - {label}), label != "plain" and label not in flagged
        by_language[language] = [
            right + (label in flagged),
            wrong + len(flagged - {label}),
            missed + (label != "plain" and label not in flagged),
        ]
        if is_wrong or is_missed:
            users = [m.content for m in one.messages if m.role == "user"]
            misses.append(f"{label} ({language}) taken for {'/'.join(flagged) or 'nothing'}: {users[-1]!r}")
    return {"rows": rows, "right_wrong_missed_by_language": by_language, "misses": misses}


def interval(marks: Any, draws: list[Any], share: Callable[[Any], float]) -> list[float]:
    import numpy as np

    low, high = np.percentile([share(one) for one in draws], (2.5, 97.5))
    return [round(float(share(marks)), 3), round(float(low), 3), round(float(high), 3)]


def show(name: str, figures: dict[str, Any], with_misses: bool) -> None:
    print(name)
    for kind, row in figures["rows"].items():
        shares = ", ".join(
            f"{what} {row[what][0]:.2f} ({row[what][1]:.2f} to {row[what][2]:.2f})" for what in SHARES
        )
        counted = ", ".join(f"{row[what]} {what}" for what in ("right", "wrong", "missed"))
        print(f"  {kind}: {counted}; {shares}")
    told = ", ".join(f"{k} {a}/{b}/{c}" for k, (a, b, c) in figures["right_wrong_missed_by_language"].items())
    print(f"  right/wrong/missed: {told}")
    if with_misses:
        print("\n".join(f"    {line}" for line in figures["misses"]))


SHARES = ("precision", "recall")

if __name__ == "__main__":
    main()
