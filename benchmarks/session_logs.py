"""A directory of agents' sessions in one pass: time, peak memory, and what a second look and a kill cost.

    python benchmarks/session_logs.py --gigabytes 1 [--json FILE]
    python benchmarks/session_logs.py --edits 600 [--json FILE]

The first writes sessions of Claude Code's form (lines of replies, calls and results, some of which fail and
are mended, some corrected by their user), and flags them: once, once more, and once killed in the middle and
gone on with. The second times one session of so many failed and mended edits beside one of half as many.
Needs no model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

WORDS = ("the", "gear", "lamp", "river", "bridge", "stone", "paper", "window", "engine", "letter", "garden")
SESSION_BYTES = 4_000_000
FILLER_CHARS = 3000  # of a tool's result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.0, help="of sessions")
    parser.add_argument("--edits", type=int, default=600, help="failed and mended ones, in one session")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    args = parser.parse_args()
    figures: dict[str, Any] = {"edits": one_session(args.edits)}
    if args.gigabytes:
        with tempfile.TemporaryDirectory(prefix="sessions-") as place:
            figures["directory"] = directory(Path(place), int(args.gigabytes * 1e9))
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def one_session(num_edits: int) -> dict[str, Any]:
    """CPU seconds from the file to the moments."""
    from apollo_curation.logs.readers import read
    from apollo_curation.moments.signals import flag
    from apollo_curation.settings import DEFAULT_STRIP

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for num in (num_edits // 2, num_edits):
            path = Path(place) / f"{num}.jsonl"
            with path.open("w") as file:
                write_session(file, random.Random(num), num_edits=num)
            started = time.process_time()
            moments = [
                moment
                for one in read([path], max_record_bytes=1 << 24)
                for moment in flag(one, list(DEFAULT_STRIP), 8)  # pyright: ignore[reportArgumentType]
            ]
            took_s = time.process_time() - started
            found[str(num)] = {
                "seconds": round(took_s, 3),
                "bytes": path.stat().st_size,
                "moments": len(moments),
            }
    return found


def directory(place: Path, num_bytes: int) -> dict[str, Any]:
    """Seconds and peak memory of `curate flag` over `num_bytes` of sessions."""
    logs, rng, written = place / "logs", random.Random(0), 0
    logs.mkdir()
    with (place / "pattern.jsonl").open("w") as file:
        write_session(file, rng, num_bytes=SESSION_BYTES)
    pattern = (place / "pattern.jsonl").read_bytes()
    while written < num_bytes:  # no two sessions are alike: their moments are told apart by what they say
        name = f"s{written // len(pattern):06d}"
        data = pattern.replace(b"@session@", name.encode())
        (logs / f"{name}.jsonl").write_bytes(data)
        written += len(data)
    figures: dict[str, Any] = {"bytes": written, "files": len(list(logs.iterdir()))}
    figures["first"] = flag(place / "a", logs)
    figures["again"] = flag(place / "a", logs)
    flag(place / "b", logs, kill_after_files=figures["files"] // 2)
    figures["gone_on_after_a_kill"] = flag(place / "b", logs)
    shutil.rmtree(logs)
    return figures


def flag(state_dir: Path, logs: Path, *, kill_after_files: int | None = None) -> dict[str, Any]:
    """kill_after_files: SIGKILL when so many were read."""
    code = (
        "import sys, json, resource, time; from pathlib import Path\n"
        "from apollo_curation.logs.follow import Follower\n"
        "from apollo_curation.moments.moments import Moments\n"
        "from apollo_curation.moments.signals.intake import take_new\n"
        "from apollo_curation.settings import Curation\n"
        "from apollo_curation.store import Store\n"
        "with Store(Path(sys.argv[1]) / 'curation.sqlite') as store:\n"
        "    settings = Curation()\n"
        "    follower = Follower(store, [Path(sys.argv[2])], settings)\n"
        "    taken = take_new(store, Moments(store), follower, settings)\n"
        "    total = sum(Moments(store).counts().values())\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps({'cpu_seconds': round(time.process_time(), 1), 'peak_kib': peak,\n"
        "                  'conversations': taken.num_conversations, 'moments': total}))\n"
    )
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, state_dir, logs], stdout=subprocess.PIPE)
    while kill_after_files is not None and process.poll() is None:
        if num_read(state_dir / "curation.sqlite") >= kill_after_files:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    out, _ = process.communicate()
    took_s = time.perf_counter() - started
    said = json.loads(out) if process.returncode == 0 else {}
    return {"seconds": round(took_s, 1), **said}


def num_read(store: Path) -> int:
    if not store.exists():
        return 0
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
        try:
            return db.execute("SELECT COUNT(*) FROM read_files").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def write_session(file: Any, rng: random.Random, *, num_edits: int | None = None, num_bytes: int = 0) -> None:
    """num_edits: calls that fail and are mended, all behind one prompt; else prompts until num_bytes."""
    number, parent = 0, None

    def line(kind: str, content: Any, **message: Any) -> None:
        nonlocal number, parent
        number += 1
        uuid = f"u{number}"
        said = {"role": kind, "content": content, **message}
        record = {"parentUuid": parent, "isSidechain": False, "sessionId": "s", "type": kind, "uuid": uuid}
        file.write(json.dumps({**record, "message": said}) + "\n")
        parent = uuid

    def edit(at: int, *, fails: bool) -> None:
        old = f"{rng.choice(WORDS)} = {at}{' ' if fails else ''}  # @session@"
        use = {"type": "tool_use", "id": f"t{number}", "name": "Edit"}
        use["input"] = {"file_path": f"part{at % 7}.py", "old_string": old, "new_string": f"x = {at}"}
        line("assistant", [use], id=f"m{number}")
        text = "String to replace not found in file." if fails else f"edited {prose(rng, FILLER_CHARS)}"
        line("user", [{"type": "tool_result", "tool_use_id": use["id"], "content": text, "is_error": fails}])

    if num_edits is not None:
        line("user", "Put all of it right, please.")
        for at in range(num_edits):
            edit(at, fails=True)
            edit(at, fails=False)
        line("assistant", [{"type": "text", "text": "All of it is right now."}], id="last")
        return
    at = 0
    while file.tell() < num_bytes:
        at += 1
        line("user", f"Change part {at} of @session@: {prose(rng, 200)}")
        for step in range(8):
            edit(at * 10 + step, fails=rng.random() < 0.05)
        line(
            "assistant",
            [{"type": "text", "text": f"Part {at} is changed. {prose(rng, 300)}"}],
            id=f"a{number}",
        )
        if rng.random() < 0.1:
            line("user", f"That's wrong, I asked for part {at + 1}.")
            line("assistant", [{"type": "text", "text": f"Part {at + 1} is changed."}], id=f"a{number}")


def prose(rng: random.Random, num_chars: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_chars // 7))


if __name__ == "__main__":
    main()
