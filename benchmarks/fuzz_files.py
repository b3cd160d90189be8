"""Random bytes in the files that the worker reads: refused, or mended, never trusted. For fuzz.py.

In a process of its own, since wrong numbers in a manifest could end it. `python fuzz_files.py DIRECTORY SEED`
does a turn for each line that it reads and writes a line about it.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz_grammar import Grammar, changed_bytes, encode
from fuzz_system import Findings

MAX_TURNS = 400  # of one process: each leaves some memory
TARGETS = {
    "manifest": "run/weights-0.json",
    "marks": "state/step.marks",
    "state": "state/state.json",
    "queue": "state/queue.sqlite",
    "commit": "model/.apollo/commit.json",
    "optimizer": "model/.apollo/optimizer-*",
    "delta": "model/.apollo/delta-*",
}
STEPS = {"one": 1, "two": 1, "three": 1, "four": 3}


class Files:
    """The process, started again where it ended."""

    def __init__(self, base: Path, seed: int, tally: Findings):
        self.base, self.seed, self.tally = base / "files", seed, tally
        self.child: subprocess.Popen[str] | None = None
        self.num_turns = self.num_children = 0

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if self.child is not None:
            assert self.child.stdin
            self.child.stdin.close()
            self.child.wait(60)
            self.child = None

    def turn(self) -> None:
        if self.child is None or self.num_turns >= MAX_TURNS:
            self.end()
            self.start()
        assert self.child is not None
        assert self.child.stdin
        assert self.child.stdout
        self.num_turns += 1
        self.child.stdin.write("turn\n")
        self.child.stdin.flush()
        if not (line := self.child.stdout.readline()):
            told = (self.base / "now.txt").read_text()
            self.tally.count("files", "process ended")
            self.tally.problem(f"the process ended with status {self.child.wait(60)} in {told}")
            self.child = None
            return
        said = json.loads(line)
        self.tally.count(f"file: {said['kind']}", said["outcome"])
        if said["problem"]:
            self.tally.problem(f"file: {said['kind']}: {said['problem']}")

    def start(self) -> None:
        self.num_children += 1
        self.num_turns = 0
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir(parents=True)
        seed = self.seed * 10_000 + self.num_children
        with (self.base.parent / "files.log").open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, __file__, str(self.base), str(seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )


class World:
    """A trainer that was killed between two steps of the job `four` ("whole"), or inside one ("torn")."""

    def __init__(self, base: Path, seed: int):
        from served_model import Exporter, make_config, make_tiny_model
        from trainer_by_hand import with_train

        self.base, self.seed, self.num_turns = base, seed, 0
        self.config = with_train(make_config(base), spike_ratio=0.0, seed=seed)
        self.exporter = Exporter(make_tiny_model(base / "model"), self.config.runtime_dir).__enter__()
        self.weights: dict[str, list[dict[str, Any]]] = {}
        self.plans: dict[str, bytes] = {}
        self.boot_id = self.exporter.manifest.boot_id
        for kind in ("whole", "torn"):
            self.make(kind)

    def make(self, kind: str) -> None:
        import trainer_by_hand as by_hand
        from apollo_worker.jobs.job_plan import encode_plan

        if not (self.base / "untouched").exists():
            self.keep("untouched")
            self.untouched = self.live_tensors()
        self.bring_back("untouched", self.untouched)
        with by_hand.Trainer(self.config) as trainer:
            for text, num_steps in STEPS.items():
                trainer.submit(text, epochs=num_steps)
                if text == "four":
                    break
                job = trainer.queue.take()
                assert job is not None
                self.plans[text] = encode_plan(job.plan)
                trainer.worker.train(job)
                if text != "three":
                    trainer.sync("full" if text == "one" else "delta")
                    committed = trainer.live()
            by_hand.kill_in_backward(trainer, 2)
            job = trainer.queue.take()
            assert job is not None
            self.plans["four"] = encode_plan(job.plan)
            with suppress(by_hand.Killed):
                trainer.worker.train(job)
            if kind == "whole":
                trainer.worker.marks.end(self.boot_id, job.info.job_id, 2, 1.0)
            self.weights[kind] = [committed, trainer.live()]
            self.job_ids = [one.job_id for one in trainer.queue.list()]
        self.keep(kind)

    def keep(self, kind: str) -> None:
        for name in ("run", "state", "model"):
            shutil.copytree(self.base / name, self.base / kind / name)

    def bring_back(self, kind: str, tensors: dict[str, Any]) -> None:
        for name in ("run", "state", "model"):
            shutil.rmtree(self.base / name)
            shutil.copytree(self.base / kind / name, self.base / name)
        for name, tensor in self.mapped().items():
            tensor.copy_(tensors[name])

    def mapped(self) -> dict[str, Any]:
        from apollo_worker.model.mapping import map_views, open_transport

        manifest = self.exporter.manifest
        return map_views(manifest, open_transport(manifest))

    def live_tensors(self) -> dict[str, Any]:
        return {name: tensor.clone() for name, tensor in self.mapped().items()}

    def turn(self) -> dict[str, Any]:
        self.num_turns += 1
        draw = random.Random(self.seed * 1_000_003 + self.num_turns)
        kind = draw.choice(("whole", "torn"))
        self.bring_back(kind, self.weights[kind][1])
        self.job_ids = self.ids_of()
        target = draw.choice([*TARGETS, "none"]) if draw.random() < 0.98 else "none"
        what, problem = self.damage(draw, target), None
        (self.base / "now.txt").write_text(f"turn {self.num_turns} of seed {self.seed}: {target}: {what}")
        try:
            outcome, problem = self.use(kind, target)
        except Exception:
            outcome, problem = "exception", traceback.format_exc()
        if target == "none" and not outcome.startswith("worked"):
            problem = problem or f"nothing was damaged, but: {outcome}"
        if problem is not None:
            problem = f"turn {self.num_turns} of seed {self.seed}, {kind}, {what}: {problem}"
        return {"kind": target, "outcome": outcome, "problem": problem}

    def ids_of(self) -> list[str]:
        from apollo_worker.jobs.queue import JobQueue

        queue = JobQueue(self.config.state_dir / "queue.sqlite", 10)
        try:
            return [job.job_id for job in queue.list()]
        finally:
            queue.close()

    # --- damage ---

    def damage(self, draw: random.Random, target: str) -> str:
        if target == "none":
            return "nothing"
        path = draw.choice(sorted(self.base.glob(TARGETS[target])))
        before = path.read_bytes()
        if path.suffix == ".json" and draw.random() < 0.5:
            told = json.loads(before)
            grammar = Grammar(draw)
            for _ in range(draw.choice((1, 1, 2))):
                told = grammar.changed(told)
            if isinstance(told, dict):  # without one it is an older program's file, and believed
                told.setdefault("seal", "0" * 32)
            after = encode(told)
        elif target == "marks" and draw.random() < 0.5:
            after = self.other_marks(draw) + before[88:]
        elif target == "queue" and draw.random() < 0.1:
            path, before, after = path.with_name(path.name + "-wal"), b"", draw.randbytes(8192)
        elif draw.random() < 0.1:
            after = draw.choice((b"", draw.randbytes(4096), b"{}", b"null", before * 2))
        else:
            after = changed_bytes(draw, before)
        path.chmod(0o600) if path.exists() else None
        path.write_bytes(after)
        at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        changed = f"{before[at : at + 40]!r} {after[at : at + 40]!r}"
        return f"{path.name}, {len(before)} to {len(after)} bytes, from {at}: {changed}"

    def other_marks(self, draw: random.Random) -> bytes:
        from apollo_worker.trainer import step_marks

        boot = draw.choice((self.boot_id, self.boot_id[:-1] + "0", "")).encode()
        job = draw.choice((self.job_ids[0].removeprefix("job-"), "write-back", "", "x")).encode()
        numbers = [draw.choice((0, 1, 2, 3, 4, 2**63)) for _ in range(3)]
        return step_marks._LAYOUT.pack(
            boot, job[:24], *numbers[:2], draw.choice((1.0, float("nan"))), numbers[2]
        )

    # --- use ---

    def use(self, kind: str, target: str) -> tuple[str, str | None]:
        """(outcome, problem) of a worker's whole life on the files as they are."""
        import torch
        import trainer_by_hand as by_hand
        from apollo_router.served import ServedBoot

        from apollo_ipc.checkpoint import verify
        from apollo_ipc.errors import ApolloError

        ServedBoot(self.config.runtime_dir).refresh()  # the router's look at the manifest
        trainer = None
        try:
            trainer = by_hand.Trainer(self.config)
            if not trainer.worker.attachment.ensure():
                assert trainer.board.state.attach_error, "not attached, and no word why"
                return "refused", None
            live = trainer.live()
            is_one = [
                live.keys() == known.keys() and all(torch.equal(live[n], known[n]) for n in known)
                for known in self.weights[kind]
            ]
            if not any(is_one):
                return "trusted", "the weights are neither those of the checkpoint nor those that were live"
            for job in trainer.queue.list():
                trainer.queue.get(job.job_id, with_history=True)
            failed = self.train_all(trainer)
            trainer.sync()
            if found := verify(self.base / "model"):
                is_named = target in ("optimizer", "delta")
                return ("named by verify", None) if is_named else ("trusted", f"verify: {found[0]}")
            return self.judge(trainer, failed, target, is_restored=is_one[0])
        except ApolloError as error:
            return f"refused ({error.code})", None
        finally:
            if trainer is not None:
                trainer.kill()

    def train_all(self, trainer: Any) -> int:
        """How many plans were not those that were stored."""
        from apollo_worker.jobs.job_plan import encode_plan

        num = 0
        while (job := trainer.queue.take()) is not None:
            num += encode_plan(job.plan) not in self.plans.values()
            trainer.worker.train(job)
        return num

    def judge(
        self, trainer: Any, num_other_plans: int, target: str, *, is_restored: bool
    ) -> tuple[str, str | None]:
        jobs = trainer.queue.list()[::-1]
        if num_other_plans:
            return "trusted", "a job was trained whose plan is not the one that was stored"
        if any(job.state == "failed" for job in jobs):
            return "job failed", None
        states = [(job.job_id, job.state, job.steps_done, job.num_steps) for job in jobs]
        wanted = [(one, "durable", n, n) for one, n in zip(self.job_ids[::-1], STEPS.values(), strict=True)]
        if states != wanted and target == "queue":
            return "another number in a row", None  # SQLite keeps no checksums: docs/recovery.md says so
        if states != wanted:
            return "trusted", f"jobs are {states}, not {wanted}"
        return "worked" if not is_restored else "worked, weights restored", None


def main() -> None:
    import fuzz_system  # the path to the stand-in

    assert fuzz_system.ROOT
    logging.disable(logging.CRITICAL)
    world = World(Path(sys.argv[1]), int(sys.argv[2]))
    for _ in sys.stdin:
        print(json.dumps(world.turn()), flush=True)
    world.exporter.kill()


if __name__ == "__main__":
    main()
