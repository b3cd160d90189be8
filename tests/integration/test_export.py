"""The export inside vLLM: whatever goes wrong in it, vLLM starts, and the manifest (or the log) says why."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from apollo_worker.model.live_model import attach
from safetensors.torch import save_file
from torch import nn

from apollo_ipc.errors import AttachError, ConfigError
from apollo_ipc.manifest import (
    Manifest,
    Serving,
    is_running,
    manifest_path,
    read_manifest,
    start_ticks,
    write_manifest,
)

pytestmark = pytest.mark.vllm
BOOM = "the disk is on fire"
WEIGHT = torch.arange(64).view(8, 8).bfloat16()


@pytest.fixture(scope="module")
def export_module() -> Iterator[Any]:
    from apollo_router import export  # 20 s: it imports vLLM

    with pytest.MonkeyPatch.context() as patch:  # it asks a whole ModelConfig
        patch.setattr(export, "engine_serving", lambda _: Serving())
        yield export


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights):
        for _, loaded in weights:
            self.weight.data.copy_(loaded)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.randn(8, 8).bfloat16()}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("APOLLO_PATHS__RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("APOLLO_PATHS__STATE_DIR", str(tmp_path / "state"))
    return tmp_path


def vllm_config(base: Path, **parallel: Any) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            **{"rank": 0, "world_size": 1, "data_parallel_size": 1, "data_parallel_index": 0} | parallel
        ),
        model_config=SimpleNamespace(
            model=str(base / "model"), quantization=None, served_model_name="m", dtype=torch.bfloat16,
            max_model_len=64, enable_sleep_mode=False, enable_cumem_allocator=False,
        ),
    )  # fmt: skip


def load(
    module: Any,
    base: Path,
    make: Callable[[], Model] = Model,
    process: Callable[[Model], object] = lambda model: None,
    **parallel: Any,
) -> tuple[Model, Manifest | None]:
    """As ApolloLoader.load_model does. process: what vLLM does with the weights once they are loaded."""
    export = module.Export(vllm_config(base, **parallel))
    with export.checkpoint():
        model = make()
        export.on_made(model)
        model.load_weights([("weight", WEIGHT)])
        export.on_loaded(model)
    process(model)
    loaded = model.weight.clone()
    export.on_ready(model)
    assert torch.equal(model.weight, loaded)
    return model, read_manifest(base / "run")


def test_a_model_whose_export_goes_well_is_shared(export_module, base):
    _, manifest = load(export_module, base)
    assert manifest is not None
    assert manifest.refused == []
    assert list(manifest.views) == ["weight"]


class TurnedWhileLoading(Model):
    def load_weights(self, weights):
        super().load_weights(weights)
        self.turned = self.weight.t().contiguous()


@pytest.mark.parametrize(
    ("make", "process"),
    [
        (Model, lambda model: model.register_buffer("turned", model.weight.t().contiguous())),
        (TurnedWhileLoading, lambda model: None),
    ],
)
def test_a_copy_that_serves_in_a_weights_place_is_refused_by_name(export_module, base, make, process):
    _, manifest = load(export_module, base, make, process)
    assert manifest is not None
    with pytest.raises(AttachError, match="turned"):
        attach(manifest, verify=False)


def test_a_weight_that_is_permuted_in_place_after_loading_is_not_shared_as_it_is_on_disk(export_module, base):
    _, manifest = load(export_module, base, process=lambda model: model.weight.data.copy_(WEIGHT.flip(0)))
    assert manifest is not None
    assert manifest.views == {}
    (refusal,) = manifest.refused
    assert refusal.name == "weight"
    assert "in place" in refusal.reason


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, BOOM)


@pytest.mark.parametrize(
    "step",
    ["local_model_dir", "shard_index", "record_loading", "ParameterWatch", "derive_views", "share_cpu"],
)
def test_a_step_that_fails_leaves_a_vllm_that_serves_and_a_manifest_that_says_why(
    export_module, base, monkeypatch, step
):
    monkeypatch.setattr(export_module, step, fail)
    _, manifest = load(export_module, base)
    assert manifest is not None
    assert manifest.segments == []
    with pytest.raises(AttachError, match=f"cannot be trained live: the export in vLLM: OSError.*{BOOM}"):
        attach(manifest, verify=False)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Every longer write fails, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_runtime_directory_is_told_by_the_log_and_nothing_is_left_there(
    export_module, base, monkeypatch
):
    told: list[str] = []
    monkeypatch.setattr(
        export_module.logger, "critical", lambda message, *args, **_: told.append(message % args)
    )
    with files_of_at_most(100):
        load(export_module, base)
    assert "CANNOT BE TRAINED: OSError: [Errno 27] File too large" in told[0]
    assert list((base / "run").iterdir()) == []


@pytest.mark.parametrize("step", ["read_config", "make_private_dir"])
def test_without_a_runtime_directory_the_log_says_why(export_module, base, monkeypatch, step):
    def refuse(*_: object) -> None:
        raise ConfigError("train.lr: must be positive")

    told: list[str] = []
    monkeypatch.setattr(
        export_module.logger, "critical", lambda message, *args, **_: told.append(message % args)
    )
    monkeypatch.setattr(export_module, step, refuse)
    _, manifest = load(export_module, base)
    assert manifest is None
    assert told == ["apollo-ipc: this model CANNOT BE TRAINED: train.lr: must be positive"]


# --- what is true in the process that loads ---


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("size", [1, 2])
def test_each_engine_of_a_dense_model_knows_that_it_is_one_of_several(export_module, base, size, index):
    from vllm.config import ParallelConfig

    parallel = ParallelConfig(data_parallel_size=size)
    parallel.data_parallel_index = index if size > 1 else 0
    parallel.reconfigure_for_independent_dp_rank()  # vllm/v1/engine/core.py, for dense models
    assert parallel.data_parallel_size == 1
    config = vllm_config(base)
    config.parallel_config = parallel
    refused = {r.name: r.blocks for r in export_module.unsupported_settings(config)}
    assert refused == ({"--data-parallel-size": True} if size > 1 else {})


def test_an_engine_whose_name_is_that_of_one_of_several_is_refused(export_module, base, monkeypatch):
    monkeypatch.setattr("multiprocessing.current_process", lambda: SimpleNamespace(name="EngineCore_DP0"))
    _, manifest = load(export_module, base)
    assert manifest is not None
    with pytest.raises(AttachError, match="--data-parallel-size: each engine has a copy"):
        attach(manifest, verify=False)


def test_the_rust_front_end_is_refused_by_name(export_module, base, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    _, manifest = load(export_module, base)
    assert manifest is not None
    assert [r.name for r in manifest.refused if r.blocks] == ["VLLM_USE_RUST_FRONTEND"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({}, None),
        ({"architectures": ["Qwen3ForCausalLM"]}, None),
        ({"rope_theta": 5e6, "architectures": ["Qwen3ForCausalLM"]}, "set rope_theta there"),
        (
            {"rope_parameters": {"factor": 2.0}, "rms_norm_eps": 1e-5},
            "set rms_norm_eps, rope_parameters there",
        ),
        (lambda config: config, "set what the function sets there"),
    ],
)
def test_another_configuration_than_the_directorys_is_refused_by_name(export_module, base, overrides, named):
    config = vllm_config(base)
    config.model_config.hf_overrides = overrides
    refused = {r.name: r.reason for r in export_module.unsupported_settings(config) if r.blocks}
    assert list(refused) == (["--hf-overrides"] if named else [])
    assert not named or named in refused["--hf-overrides"]
    config.model_config.hf_overrides, config.model_config.hf_config_path = {}, "/elsewhere"
    assert [r.name for r in export_module.unsupported_settings(config)] == ["--hf-config-path"]


def manifest_of(pid: int, base: Path, manifest: Manifest) -> Path:
    ticks = start_ticks(pid)
    assert ticks
    write_manifest(msgspec.structs.replace(manifest, pid=pid, pid_start_ticks=ticks), base / "run")
    return manifest_path(base / "run")


def test_a_vllm_that_lives_keeps_its_manifest_and_one_that_has_ended_does_not(
    export_module, base, monkeypatch
):
    monkeypatch.setattr(export_module, "LAST_ONE_WAIT_S", 0.3)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", False)
    _, manifest = load(export_module, base)
    assert manifest is not None
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        before = manifest_of(other.pid, base, manifest).read_bytes()
        load(export_module, base)
        assert manifest_path(base / "run").read_bytes() == before
    finally:
        other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie: ended, and not yet reaped
    assert not is_running(msgspec.json.decode(before, type=Manifest))
    _, manifest = load(export_module, base)
    other.wait()
    assert manifest is not None
    assert manifest.pid == os.getpid()


# --- several ranks ---


def test_a_rank_of_several_says_what_it_holds(export_module, base, monkeypatch):
    boot = []
    monkeypatch.setattr(export_module, "shared_boot_id", lambda parallel: boot.append(parallel) or "b" * 32)
    load(export_module, base, rank=1, world_size=2)
    manifest = read_manifest(base / "run", 1)
    assert manifest is not None
    assert (manifest.boot_id, manifest.views, manifest.refused) == ("b" * 32, {}, [])
    assert manifest.pieces["weight"].pieces[0].shape == [8, 8]
    assert len(boot) == 1


def test_a_rank_whose_export_fails_still_meets_the_others(export_module, base, monkeypatch):
    met = []
    monkeypatch.setattr(export_module, "shared_boot_id", lambda _: met.append(1) or "b" * 32)
    monkeypatch.setattr(export_module, "local_model_dir", fail)
    load(export_module, base, rank=1, world_size=2)
    assert met
    manifest = read_manifest(base / "run", 1)
    assert manifest is not None
    assert (manifest.boot_id, manifest.refused[0].name) == ("b" * 32, "the export in vLLM")


@pytest.mark.parametrize(
    ("parallel", "name"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"nnodes": 2}, "--nnodes"),
        ({"enable_eplb": True}, "--enable-eplb"),
    ],
)
def test_what_one_trainer_cannot_reach_is_refused_by_name(export_module, base, parallel, name):
    config = vllm_config(base, world_size=2, **parallel)
    assert [(r.name, r.blocks) for r in export_module.unsupported_settings(config)] == [(name, True)]
