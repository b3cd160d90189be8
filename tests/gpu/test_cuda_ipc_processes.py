"""Several processes on one export: two workers at once, one that is killed, the next vLLM, odd layouts.

Each worker is a child of its own that does what it is told, one line after the other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from apollo_router.memory import share_cuda
from places import SUPPORT
from safetensors.torch import load_file
from served_model import SLEEPLESS, Exporter, digest, make_manifest, make_tiny_model
from torch import nn

from apollo_ipc.manifest import View, write_manifest

DEVICE = "cuda:0"
K = "model.layers.0.self_attn.k_proj.weight"  # in the middle of a merged tensor
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
TIMEOUT_S = 120

WORKER = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from served_model import digest
from apollo_ipc.manifest import read_manifest
from apollo_worker.model.live_model import attach

def attached():
    return attach(read_manifest(Path(sys.argv[1])), verify=False)

def finish():
    if torch.cuda.is_available():
        torch.cuda.synchronize()

live = attached()
print(json.dumps("attached"), flush=True)
for line in sys.stdin:
    command, name, value = json.loads(line)
    with torch.no_grad():
        if command == "fill":
            live.tensors[name].fill_(value)
        elif command == "flood":  # kernels that are still running when this is answered
            for _ in range(value):
                for tensor in live.trained_tensors().values():
                    tensor.mul_(1.0)
            print(json.dumps("flooding"), flush=True)
            continue
        elif command == "attach again":
            assert not live.is_alive()
            live.close()
            live = attached()
    finish()
    print(json.dumps(digest(live.tensors[name])), flush=True)
"""


class Worker:
    def __init__(self, runtime_dir: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(runtime_dir), str(SUPPORT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.answer() == "attached"

    def answer(self) -> str:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline()  # end of file where it has died: it ends by itself on an error
        assert line, self.process.stderr.read()[-3000:]
        return json.loads(line)

    def ask(self, command: str, name: str = NORM, value: float = 0.0) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, name, value]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def served(model_dir: Path, runtime_dir: Path) -> Iterator[Exporter]:
    with Exporter(model_dir, runtime_dir, DEVICE) as exporter:
        yield exporter


@pytest.fixture
def workers(served: Exporter) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        started += [Worker(served.runtime_dir) for _ in range(2)]
        yield started
    finally:
        for worker in started:
            worker.kill()


def test_two_workers_at_once_and_the_owner_see_each_others_writes(served, workers) -> None:
    one, other = workers
    for writer, reader, name, value in ((one, other, K, 0.25), (other, one, UP, -2.0)):
        written = writer.ask("fill", name, value)
        assert reader.ask("digest", name) == served.digest(name) == written
    assert one.ask("digest", NORM) == other.ask("digest", NORM) == served.digest(NORM), "nothing else changed"
    filled = served.fill(NORM, 3.0)
    assert one.ask("digest", NORM) == other.ask("digest", NORM) == filled


def test_a_worker_that_is_killed_with_kernels_in_flight_harms_neither_owner_nor_the_other(
    served, workers
) -> None:
    one, other = workers
    before = {name: served.digest(name) for name in (K, UP, NORM)}
    assert one.ask("flood", value=2000) == "flooding"
    one.kill()
    assert {name: served.digest(name) for name in before} == before
    assert other.ask("fill", K, 0.5) == served.digest(K)
    assert served.fill(UP, 1.5) == other.ask("digest", UP)
    third = Worker(served.runtime_dir)
    try:
        assert third.ask("digest", K) == served.digest(K)
    finally:
        third.kill()


def test_a_worker_lets_a_dead_vllm_go_and_attaches_to_the_next_one(served, workers, model_dir) -> None:
    worker = workers[0]
    worker.ask("fill", K, 0.5)
    served.kill()
    original = digest(load_file(model_dir / "model.safetensors")[K])
    with Exporter(model_dir, served.runtime_dir, DEVICE) as following:
        assert worker.ask("attach again", K) == following.digest(K) == original
        assert worker.ask("fill", K, 2.0) == following.digest(K)


# --- layouts that the loader's views may have ---

LAYOUTS = {  # name -> (the parameter, where a checkpoint tensor lies in it)
    "fp32": (lambda: torch.randn(24, 40), lambda t: t),
    "fp16": (lambda: torch.randn(24, 40).half(), lambda t: t[3:9]),
    "bf16": (lambda: torch.randn(24, 40).bfloat16(), lambda t: t[:, 8:16]),
    "transposed": (lambda: torch.randn(24, 40).bfloat16(), lambda t: t.T),
    "strided": (lambda: torch.randn(24, 40), lambda t: t[::2, ::5]),
    "three dims": (lambda: torch.randn(4, 24, 40).bfloat16(), lambda t: t[1].T),
    "one number": (lambda: torch.randn(1), lambda t: t[0]),
}
LAYOUT_WORKER = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from served_model import digest
from apollo_ipc.manifest import read_manifest
from apollo_worker.model.mapping import map_views, open_transport
manifest = read_manifest(Path(sys.argv[1]))
transport = open_transport(manifest)
views = map_views(manifest, transport)
found = {name: [str(view.dtype), list(view.shape), digest(view)] for name, view in views.items()}
with torch.no_grad():
    for view in views.values():
        view.neg_()
if torch.cuda.is_available():
    torch.cuda.synchronize()
print(json.dumps(found), flush=True)
sys.stdin.readline()
"""


def own_layouts(connection, runtime_dir: Path, model_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    for name, (make, _) in LAYOUTS.items():
        model.register_parameter(name, nn.Parameter(make().to(DEVICE), requires_grad=False))
    memory = share_cuda(model, SLEEPLESS)
    parameters = dict(model.named_parameters())
    parts = {name: LAYOUTS[name][1](p.data) for name, p in parameters.items()}
    views = {
        name: View(name, list(part.shape), list(part.stride()), part.storage_offset() - p.storage_offset())
        for (name, part), p in zip(parts.items(), parameters.values(), strict=True)
    }
    write_manifest(make_manifest(model_dir, parameters, memory, views, []), runtime_dir)
    kept = {name: p.clone() for name, p in parameters.items()}
    connection.send({n: [str(part.dtype), list(part.shape), digest(part)] for n, part in parts.items()})
    assert connection.poll(TIMEOUT_S)
    connection.recv()
    for name, p in kept.items():
        LAYOUTS[name][1](p).neg_()
    connection.send({name: torch.equal(p, kept[name]) for name, p in parameters.items()})


def test_views_of_any_dtype_and_stride_are_read_and_written_where_they_lie(runtime_dir, model_dir) -> None:
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    owner = context.Process(target=own_layouts, args=(theirs, runtime_dir, model_dir), daemon=True)
    owner.start()
    try:
        assert connection.poll(TIMEOUT_S)
        expected = connection.recv()
        done = subprocess.run(
            [sys.executable, "-c", LAYOUT_WORKER, str(runtime_dir), str(SUPPORT)],
            input="\n", capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1]) == expected
        connection.send("written")
        assert connection.poll(TIMEOUT_S)
        assert connection.recv() == dict.fromkeys(LAYOUTS, True), "written there and nowhere else"
    finally:
        if owner.is_alive() and owner.pid is not None:
            os.kill(owner.pid, signal.SIGKILL)
        owner.join(TIMEOUT_S)


@pytest.mark.parametrize("setting", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_vllms_sleep_mode_is_refused_by_its_flag(setting) -> None:
    model = nn.Linear(8, 8, device=DEVICE)
    config = SimpleNamespace(model_config=SimpleNamespace(**{setting: True}))
    memory = share_cuda(model, config)
    assert [refusal.name for refusal in memory.refused] == [f"--{setting.replace('_', '-')}"]
    assert memory.segments == []
