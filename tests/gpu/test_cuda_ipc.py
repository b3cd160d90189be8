"""The cuda_ipc transport between two real processes: merged weights in torch's allocator, mapped by a worker.

The mapping process is a child of its own each time: the death of an exporter may leave its CUDA context in
error, which nothing but the end of the process cures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import SUPPORT
from safetensors.torch import load_file
from served_model import Exporter, digest, make_tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"  # in the middle of a merged tensor

WORKER = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from served_model import digest
from apollo_ipc.manifest import read_manifest
from apollo_worker.model.live_model import attach
live = attach(read_manifest(Path(sys.argv[1])), verify=sys.argv[2] == "verify")
found = {name: digest(tensor) for name, tensor in live.trained_tensors().items()}
with torch.no_grad():
    live.tensors[sys.argv[4]].fill_(0.5)
torch.cuda.synchronize()
print(json.dumps({"device": str(live.device), "digests": found, "num": live.num_parameters}), flush=True)
live.close()
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served(model_dir: Path, tmp_path: Path):
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    with Exporter(model_dir, runtime_dir, "cuda:0") as exporter:
        yield exporter


def run_worker(served: Exporter, name: str, *, verify: bool, **env: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(served.runtime_dir), "verify" if verify else "trust", str(SUPPORT), name]
    return subprocess.run(
        [sys.executable, "-c", WORKER, *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, **env},
    )  # fmt: skip


def answer_of(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_view_equals_the_checkpoint_bit_for_bit_and_writes_reach_the_owner(served, model_dir) -> None:
    checkpoint = load_file(model_dir / "model.safetensors")
    answer = answer_of(run_worker(served, K, verify=True))
    assert answer["device"].startswith("cuda")
    assert answer["digests"] == {name: digest(checkpoint[name]) for name in answer["digests"]}
    assert served.digest(K) == digest(checkpoint[K].fill_(0.5))
    neighbour = K.replace("k_proj", "v_proj")
    assert served.digest(neighbour) == digest(checkpoint[neighbour]), "only the view was written"


def test_a_second_worker_opens_the_same_export_after_the_first_has_gone(served) -> None:
    answer_of(run_worker(served, K, verify=True))
    again = answer_of(run_worker(served, DOWN, verify=False))
    assert again["digests"][K] == served.digest(K), "the first worker's write is still there"


def test_a_device_that_the_worker_does_not_see_is_refused_by_its_uuid(served) -> None:
    done = run_worker(served, K, verify=True, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "not visible" in done.stderr or "No CUDA" in done.stderr


STEPPING_WORKER = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from served_model import digest
from apollo_ipc.config import Train
from apollo_ipc.manifest import read_manifest
from apollo_worker.model.live_model import attach
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.step.step import Trainer, VllmDied
live = attach(read_manifest(Path(sys.argv[1])), verify=True)
trainer = Trainer(live, Train())
example = TokenisedExample([256, 72, 105, 33, 258], [False, False, True, True, True])
results = [trainer.step(example, 1e-3) for _ in range(5)]
digests = {name: digest(tensor) for name, tensor in live.trained_tensors().items()}
losses, bad = [result.loss for result in results], [result.is_bad for result in results]
print(json.dumps({"losses": losses, "bad": bad, "digests": digests}), flush=True)
sys.stdin.readline()  # the exporter is killed before the answer comes
noticed = not live.is_alive()
try:
    trainer.step(example, 1e-3)
    stopped = False
except VllmDied:
    stopped = True
if sys.argv[3] == "in flight":  # kernels that still write when the memory's owner has gone
    with torch.no_grad():
        for _ in range(200):
            for tensor in live.trained_tensors().values():
                tensor.mul_(1.0)
del trainer
live.close()
torch.zeros(1, device="cuda").item()  # the device still answers
print(json.dumps({"noticed": noticed, "stopped": stopped, "left_bytes": torch.cuda.memory_allocated()}))
"""


@pytest.mark.parametrize("writes", ["none", "in flight"])
def test_steps_reach_the_owner_and_its_death_stops_them_and_lets_everything_go(served, writes) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", STEPPING_WORKER, str(served.runtime_dir), str(SUPPORT), writes],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert worker.stdout is not None
    try:
        trained = json.loads(worker.stdout.readline())
        assert not any(trained["bad"])
        assert trained["losses"][-1] < trained["losses"][0]
        for name, expected in trained["digests"].items():
            assert served.digest(name) == expected, "the owner does not see what the worker wrote"
        served.kill()
        answer, _ = worker.communicate("killed\n", timeout=120)
    finally:
        worker.kill()
    assert worker.returncode == 0, "the device was in error after the owner's death: see docs/gpu.md"
    end = json.loads(answer.splitlines()[-1])
    assert end["noticed"]
    assert end["stopped"]
    assert end["left_bytes"] <= 2**20, "the optimizer's state is still on the GPU"


def test_expandable_segments_are_refused_by_name(model_dir, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    with Exporter(model_dir, runtime_dir, "cuda:0") as served:
        assert "expandable_segments" in [refusal.name for refusal in served.manifest.refused]
        done = run_worker(served, K, verify=True)
    assert done.returncode != 0
    assert "expandable_segments" in done.stderr
