"""A checkpoint sync, full and delta, against other ways to write the same tensors, beside its floors.

All in one process, in turns, round after round; medians. What is written is on disk when the clock stops
(fsync, fdatasync, msync). Before each turn everything earlier is flushed, untimed. Tensors change as training
changes them: ten steps of our optimizer at lr 1e-5. The floors: reading the live bytes once with one thread,
writing the changed tensors plainly (8 MiB blocks into new files, and fdatasync), and both.

    python benchmarks/checkpoint.py --gb 1 --rounds 5 --json checkpoint.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FRACTIONS = (0.0, 0.01, 0.1, 1.0)
FLOORS = ("read once", "plain write", "read + plain write")
AIMS = {
    "unchanged_over_read_floor": 1.5,
    "all_changed_over_plain_write": 1.3,
    "delta_bytes_over_full_bytes": 0.2,
}
# In a virtual machine that hands free memory back to its host, a page cache of new pages costs more than the
# disk: 1 GB into new files took 3 s, and 0.7 s where a contestant before had just let go of as much. So each
# waits until what was free is gone (page_reporting in Linux: after 2 s).
SETTLE_S = 4.0
DISK_FACTOR = 8  # of the tensors' bytes: every contestant keeps its files


@dataclasses.dataclass
class Row:
    """Of one contestant at one share of changed tensors; the values of all rounds."""

    name: str
    fraction: float
    seconds: list[float] = dataclasses.field(default_factory=list)
    bytes_written: list[int] = dataclasses.field(default_factory=list)
    waited_s: list[float] = dataclasses.field(default_factory=list)
    memory_bytes: list[int] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        low, middle, high = (
            statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        )
        return {
            "name": self.name, "tensors_changed_fraction": self.fraction, "seconds": middle,
            "quartiles_s": [low, high], "bytes_written": statistics.median(self.bytes_written),
            "training_stood_still_s": statistics.median(self.waited_s),
            "peak_memory_growth_bytes": statistics.median(self.memory_bytes),
        }  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0, help="bytes of all tensors, in 10^9")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settle", type=float, default=SETTLE_S, metavar="S", help="before each large write")
    parser.add_argument("--dir", type=Path, help="where to write; default: the repository's file system")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    base = options.dir or default_directory()
    free, needed = os.statvfs(base), int(options.gb * 1e9 * DISK_FACTOR)
    if (free_bytes := free.f_bavail * free.f_frsize) < needed:
        print(f"{base}: {free_bytes:,} bytes free, {needed:,} are needed", file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="apollo-bench-", dir=base) as scratch:
        bench = Bench(Path(scratch), int(options.gb * 1e9), options.settle)
        for number in range(options.rounds + 1):
            bench.run_round()
            if not number:
                bench.forget()  # the first one warms up
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
        compaction = bench.measure_compaction()
    rows = [row.as_json() for row in bench.rows.values()]
    figures = {
        "gb": bench.model.num_bytes / 1e9, "rounds": options.rounds, "cores": os.cpu_count(),
        "load_before": load, "load_after": os.getloadavg()[0],
        "moved_elements_fraction": bench.model.moved_fraction(), "rows": rows, "compaction": compaction,
        **ratios(rows),
    }  # fmt: skip
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def default_directory() -> Path:
    """The temporary directory where it is on the repository's file system, else the repository itself."""
    repository, temporary = Path(__file__).parents[1], Path(tempfile.gettempdir())
    return temporary if temporary.stat().st_dev == repository.stat().st_dev else repository


class Bench:
    def __init__(self, base: Path, num_bytes: int, settle_s: float):
        import checkpoint_peers as peers
        from apollo_worker.sync.writer import CheckpointWriter
        from checkpoint_model import BenchModel

        self.model = BenchModel(base / "model", num_bytes)
        self.rows: dict[tuple[str, float], Row] = {}
        self._base, self._settle_s = base, settle_s
        self._writer = CheckpointWriter(self.model.model_dir, self.model.live)
        self._version = 0
        self._peers: dict[str, Callable[..., Any]] = {
            "safetensors save_file": peers.save_safetensors,
            "torch.save": peers.save_torch,
            "dcp.async_save": peers.save_distributed,
        }
        self._others = peers
        self._sync("full")  # the record of digests

    def run_round(self) -> None:
        model, others = self.model, self._others
        for fraction in FRACTIONS:
            changed = model.changed(fraction)
            self._time("read once", fraction, others.read_once, changed)
            model.turn(changed)
            self._time("sync, delta", fraction, self._sync_row("delta"), changed)
            self._time("sync, full", fraction, self._sync_row("full"), changed)
            if not changed:
                continue
            self._time("plain write", fraction, others.write_plainly, changed)
            self._time("plain overwrite", fraction, others.overwrite_plainly, changed)
            self._time("mmap and memcpy", fraction, others.copy_into_map, changed)
            self._add_floors(fraction)
        for name, peer in self._peers.items():  # they write everything, whatever has changed
            self._time(name, 1.0, peer, model.names)

    def forget(self) -> None:
        self.rows.clear()

    def measure_compaction(self) -> dict[str, float]:
        """A full sync that keeps the older version, and the making of differences from whole shards."""
        from apollo_worker.sync.writer import CheckpointWriter

        writer = CheckpointWriter(self.model.model_dir, self.model.live, num_kept=2)
        self.model.turn(self.model.names)
        self._version += 1
        os.sync()
        began = time.perf_counter()
        running = writer.start("full", weight_version=self._version, applied_seq=0)
        running.committed.result()
        committed_s = time.perf_counter() - began
        running.join()
        return {"full_sync_s": committed_s, "compaction_s": time.perf_counter() - began - committed_s}

    def _sync_row(self, kind: Any) -> Callable[..., Any]:
        return lambda *_: self._sync(kind)

    def _sync(self, kind: Any) -> tuple[int, float]:
        self._version += 1
        result = self._writer.sync(kind, weight_version=self._version, applied_seq=0)
        return result.bytes_written, result.training_waited_s

    def _time(self, name: str, fraction: float, work: Callable[..., Any], changed: list[str]) -> None:
        directory = self._base / name.replace(" ", "-")
        directory.mkdir(exist_ok=True)
        os.sync()
        if len(changed) == len(self.model.names):
            time.sleep(self._settle_s)
        before = reset_peak_memory()
        began = time.perf_counter()
        num_bytes, waited_s = work(self.model, directory, changed)
        seconds = time.perf_counter() - began
        self._others.tidy(directory)
        row = self.rows.setdefault((name, fraction), Row(name, fraction))
        row.seconds.append(seconds)
        row.bytes_written.append(num_bytes)
        row.waited_s.append(seconds if waited_s is None else waited_s)
        row.memory_bytes.append(peak_memory() - before)

    def _add_floors(self, fraction: float) -> None:
        read, write = self.rows["read once", fraction], self.rows["plain write", fraction]
        both = self.rows.setdefault((FLOORS[2], fraction), Row(FLOORS[2], fraction))
        both.seconds.append(read.seconds[-1] + write.seconds[-1])
        both.bytes_written.append(write.bytes_written[-1])
        both.waited_s.append(both.seconds[-1])
        both.memory_bytes.append(0)


def reset_peak_memory() -> int:
    """Resident bytes now, from which peak_memory counts anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak_memory() -> int:
    return _memory("VmHWM")


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    def row(name: str, fraction: float) -> dict[str, Any]:
        return next(r for r in rows if (r["name"], r["tensors_changed_fraction"]) == (name, fraction))

    full, delta = row("sync, full", 1.0), row("sync, delta", 1.0)
    return {
        "unchanged_over_read_floor": row("sync, full", 0.0)["seconds"] / row("read once", 0.0)["seconds"],
        "all_changed_over_plain_write": full["seconds"] / row("plain write", 1.0)["seconds"],
        "all_changed_over_plain_overwrite": full["seconds"] / row("plain overwrite", 1.0)["seconds"],
        "delta_bytes_over_full_bytes": delta["bytes_written"] / full["bytes_written"],
    }


def show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{figures['gb']:.2f} GB in bf16, medians of {figures['rounds']} rounds"
    table = Table("tensors changed", "", title=title)
    for name in ("seconds", "quartiles", "MB written", "training stood still, s", "peak memory, MB"):
        table.add_column(name, justify="right")
    for row in sorted(figures["rows"], key=lambda r: (r["tensors_changed_fraction"], r["name"] in FLOORS)):
        low, high = row["quartiles_s"]
        table.add_row(
            f"{row['tensors_changed_fraction']:.0%}",
            row["name"] + (" (floor)" if row["name"] in FLOORS else ""),
            *(f"{row['seconds']:.3f}", f"{low:.3f} {high:.3f}", f"{row['bytes_written'] / 1e6:.0f}"),
            *(f"{row['training_stood_still_s']:.3f}", f"{row['peak_memory_growth_bytes'] / 1e6:.0f}"),
        )
    console = Console(width=110)
    console.print(table)
    moved = figures["moved_elements_fraction"]
    console.print(f"training has moved {moved:.1%} of the elements of a changed tensor")
    compaction = figures["compaction"]
    console.print(
        f"keeping the older version: full sync {compaction['full_sync_s']:.2f} s, then, beside training, "
        f"{compaction['compaction_s']:.2f} s of compaction"
    )
    for name, aim in AIMS.items():
        verdict = "met" if figures[name] <= aim else "MISSED"
        console.print(f"{name.replace('_', ' ')}: {figures[name]:.2f} (aim: at most {aim}: {verdict})")


if __name__ == "__main__":
    sys.exit(main())
