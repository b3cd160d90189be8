"""The worker's side of shared weights, against a real second process that owns them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import msgspec
import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import StatusBoard
from apollo_worker.model.live_model import attach, load_offline
from apollo_worker.model.mapping import Exporter as HeldExporter
from apollo_worker.model.mapping import SharedMemoryTransport, map_views
from apollo_worker.step.step import Trainer, VllmDied
from apollo_worker.sync.writer import CheckpointWriter
from apollo_worker.trainer.attachment import Attachment
from apollo_worker.trainer.recovery import Recovery
from apollo_worker.trainer.step_marks import StepMarks
from safetensors.torch import load_file, save_file
from served_model import Exporter, digest, make_config, make_tiny_model, mapped_weights
from transformers import AutoModelForCausalLM

from apollo_ipc.config import Train
from apollo_ipc.errors import AttachError

Q, K, NORM = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.norm.weight",
)
EXAMPLE = TokenisedExample([256, 72, 105, 33, 258], [False, False, True, True, True])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(model_dir) -> dict[str, torch.Tensor]:
    return load_file(model_dir / "model.safetensors")


@pytest.fixture
def served(model_dir, tmp_path):
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    before = mapped_weights()
    with Exporter(model_dir, runtime_dir) as exporter:
        yield exporter
    assert mapped_weights() == before


@pytest.fixture
def served_until_the_middle_of_a_step(model_dir, tmp_path):
    """A backward pass that was cut off leaves its graph, and so the weights, to autograd's C++: nothing in
    Python can free it. The trainer therefore ends after it, and a fresh process goes on (worker.py)."""
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    with Exporter(model_dir, runtime_dir) as exporter:
        yield exporter


# --- what is mapped ---


def test_every_view_equals_the_checkpoint_bit_for_bit(served, checkpoint):
    views = map_views(served.manifest, SharedMemoryTransport())
    assert views.keys() == checkpoint.keys()
    for name, expected in checkpoint.items():
        assert digest(views[name]) == digest(expected), name
        assert views[name].dtype == expected.dtype
    assert len(mapped_weights()) == 1
    del views


def test_each_process_sees_what_the_other_writes(served):
    views = map_views(served.manifest, SharedMemoryTransport())
    neighbour = served.digest(Q)
    views[K].fill_(0.5)
    assert served.digest(K) == digest(views[K])
    assert served.digest(Q) == neighbour, "a write reached beyond its view in the merged tensor"
    assert served.fill(NORM, -2.0) == digest(views[NORM])
    del views


def test_the_weights_can_be_mapped_again_after_a_worker_was_killed(served, checkpoint):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from apollo_ipc.manifest import read_manifest\n"
        "from apollo_worker.model.mapping import map_views, open_transport\n"
        "manifest = read_manifest(Path(sys.argv[1]))\n"
        f"map_views(manifest, open_transport(manifest))[{K!r}].fill_(3.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(served.runtime_dir)], timeout=120)
    assert done.returncode == -9
    views = map_views(served.manifest, SharedMemoryTransport())
    assert torch.equal(views[K], torch.full_like(checkpoint[K], 3.0)), "what the dead worker wrote is there"
    assert served.digest(K) == digest(views[K])
    del views


def test_a_whole_model_attaches_and_verifies_against_the_disk(served, checkpoint):
    live = attach(served.manifest, verify=True)
    assert live.trained_tensors().keys() == checkpoint.keys()
    assert live.model.get_input_embeddings().weight is live.model.get_output_embeddings().weight
    live.close()


def test_a_served_tensor_that_differs_from_the_disk_is_named_and_nothing_stays_mapped(served):
    served.fill(NORM, 7.0)
    with pytest.raises(AttachError, match="differ from") as caught:
        attach(served.manifest, verify=True)
    assert caught.value.refused == [f"{NORM}: differs from the checkpoint"]
    del caught
    assert not mapped_weights()


# --- a tied checkpoint that holds its head a second time ---


@pytest.fixture
def redundant_head(model_dir, tmp_path) -> Path:
    """Merging and quantizing tools leave such: tie_word_embeddings is true, and lm_head is there."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "redundant"))
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def write_head(model_dir: Path, value: float) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    tensors["lm_head.weight"].fill_(value)
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})


def test_a_sync_writes_a_tied_tensor_under_each_of_its_names(redundant_head):
    live = load_offline(redundant_head)
    before = digest(live.tensors["model.embed_tokens.weight"])
    Trainer(live, Train()).step(EXAMPLE, 1e-2)
    CheckpointWriter(redundant_head, live.trained_tensors()).sync(weight_version=1, applied_seq=0)
    stored = load_file(redundant_head / "model.safetensors")
    assert digest(stored["model.embed_tokens.weight"]) == digest(stored["lm_head.weight"]) != before
    loaded = AutoModelForCausalLM.from_pretrained(redundant_head)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_a_head_that_differs_from_what_it_is_tied_to_is_refused(redundant_head):
    write_head(redundant_head, 0.5)
    with pytest.raises(AttachError, match="set tie_word_embeddings to false"):
        load_offline(redundant_head)


def test_a_head_that_is_served_apart_from_what_it_is_tied_to_is_refused(redundant_head, tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    with (
        Exporter(redundant_head, tmp_path / "run") as served,
        pytest.raises(AttachError, match=r"lm_head.weight is not model.embed_tokens.weight"),
    ):
        attach(served.manifest, verify=False)


# --- the exporter's life ---


def test_the_manifest_of_an_ended_vllm_is_stale(served):
    manifest = served.manifest
    served.kill()
    with pytest.raises(AttachError, match="of an earlier vLLM"):
        attach(manifest, verify=False)


def test_a_reused_pid_is_not_taken_for_the_exporter(served):
    manifest = served.manifest
    reused = msgspec.structs.replace(manifest, pid_start_ticks=manifest.pid_start_ticks - 1)
    with pytest.raises(AttachError, match="of an earlier vLLM"):
        HeldExporter(reused)


def test_the_exporters_death_is_noticed_at_once(served):
    held = HeldExporter(served.manifest)
    assert held.is_alive()
    os.kill(served.pid, 9)
    deadline = time.monotonic() + 10
    while held.is_alive():
        assert time.monotonic() < deadline
    held.close()


class Attached:
    """The worker's Attachment on `served`, without its service and main loop."""

    def __init__(self, served: Exporter):
        config = make_config(served.runtime_dir.parent)
        self.queue = JobQueue(config.state_dir / "queue.sqlite", 10)
        self.marks = StepMarks(config.state_dir / "step.marks")
        self.board = StatusBoard()
        recovery = Recovery(config, self.board, self.queue, self.marks)
        self.attachment = Attachment(config, self.board, recovery)

    def __enter__(self) -> Attachment:
        return self.attachment

    def __exit__(self, *_: object) -> None:
        self.attachment.detach("the test is over")
        self.queue.close()
        self.marks.close()


def test_detaching_after_training_leaves_no_mapping_and_no_optimizer(served, checkpoint):
    with Attached(served) as attachment:
        assert attachment.ensure()
        assert not attachment.trainer.step(EXAMPLE, 1e-3).is_bad
        assert served.digest(Q) != digest(checkpoint[Q]), "the step reached what is served"
        optimizer = weakref.ref(attachment.trainer.optimizer)
        assert mapped_weights()
        attachment.detach("on request")
        assert not mapped_weights()
        assert optimizer() is None, "its state would stay on the GPU"


def test_who_still_holds_a_parameter_after_detaching_holds_no_weights(served):
    with Attached(served) as attachment:
        assert attachment.ensure()
        held = attachment.trainer  # as a traceback may
        attachment.detach("on request")
        assert not mapped_weights()
        assert all(p.numel() == 0 for group in held.optimizer.param_groups for p in group["params"])
        del held


def test_a_dead_exporter_stops_the_step_and_is_let_go(served):
    with Attached(served) as attachment:
        assert attachment.ensure()
        served.kill()
        with pytest.raises(VllmDied):
            attachment.trainer.step(EXAMPLE, 1e-3)
        assert not attachment.ensure()
        assert attachment.live is None
        assert not mapped_weights()


def test_an_exporter_that_dies_in_backward_stops_the_writes_there(served_until_the_middle_of_a_step):
    with Attached(served_until_the_middle_of_a_step) as attachment:
        assert attachment.ensure()
        live = attachment.live
        checks = 0

        def dies_after_five() -> bool:
            nonlocal checks
            checks += 1
            return checks <= 5

        before = {name: tensor.clone() for name, tensor in live.trained_tensors().items()}
        live.is_alive = dies_after_five
        with pytest.raises(VllmDied):
            attachment.trainer.step(EXAMPLE, 1e-2)
        del live.is_alive
        changed = [n for n, t in live.trained_tensors().items() if not torch.equal(t, before[n])]
        assert len(changed) <= 4 < len(before)  # one check at the step's start, then one a parameter
        del live


def test_the_worker_attaches_to_the_next_vllm(served, model_dir):
    before = mapped_weights()
    with Attached(served) as attachment:
        assert attachment.ensure()
        first = attachment.live.boot_id
        served.kill()
        assert not attachment.ensure()
        with Exporter(model_dir, served.runtime_dir) as second:
            assert attachment.ensure()
            assert attachment.live.boot_id == second.manifest.boot_id != first
            attachment.detach("on request")
    assert mapped_weights() == before
