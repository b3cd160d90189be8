"""Whoever writes to a state or model directory has it alone, and the next one is told who that is."""

from __future__ import annotations

import os

import msgspec
import pytest
from apollo_worker.commands.offline import train
from apollo_worker.front.front import Front
from served_model import make_config
from trainer_by_hand import Trainer
from typer.testing import CliRunner

from apollo_ipc.checkpoint.owner import hold_model
from apollo_ipc.cli.main import app
from apollo_ipc.errors import AlreadyRunning, CheckpointError
from apollo_ipc.wire.requests import Example, TrainRequest

US = f"the worker (pid {os.getpid()}, since 2"


def test_a_second_worker_on_the_same_jobs_is_refused_wherever_its_socket_is(config, tmp_path):
    first = Front(config)
    try:
        paths = msgspec.structs.replace(config.paths, runtime_dir=str(tmp_path / "elsewhere"))
        with pytest.raises(AlreadyRunning) as refused:
            Front(msgspec.structs.replace(config, paths=paths))
        assert refused.value.message.startswith(US)
        assert f"already works on the jobs in {config.state_dir}" in refused.value.message
        assert refused.value.exit_code == 75
    finally:
        first.stop()
    Front(config).stop()


def test_a_worker_that_attaches_keeps_others_from_the_model_until_it_lets_go(
    served, config, model_dir, tmp_path
):
    (tmp_path / "other").mkdir()
    other = make_config(tmp_path / "other")
    request = TrainRequest([Example(context_ids=[1], continuation_ids=[2, 3])])
    with Trainer(config):
        with pytest.raises(CheckpointError, match="works on the model directory") as refused:
            train(model_dir, request, other)
        assert refused.value.message.startswith(US)
        (other.runtime_dir / "weights-0.json").write_bytes(
            (config.runtime_dir / "weights-0.json").read_bytes()
        )
        (other.runtime_dir / "weights-0.json").chmod(0o600)
        second = Trainer(other)
        assert not second.worker.attachment.ensure()
        assert str(second.board.state.attach_error).startswith(US)
    second.worker.attachment._tried = None  # not in five seconds, now
    assert second.worker.attachment.ensure(), second.board.state.attach_error
    second.kill()
    assert train(model_dir, request, other).state == "durable"


@pytest.mark.parametrize("command", [["restore", "0", "--model-dir"], ["forget"]])
def test_checkpoint_commands_that_write_are_refused_while_another_process_has_the_model(
    model_dir, command, config, monkeypatch
):
    monkeypatch.setenv("APOLLO_PATHS__RUNTIME_DIR", str(config.runtime_dir))
    with hold_model(model_dir, "apollo-ipc train --offline"):
        done = CliRunner().invoke(app, ["checkpoint", *command, str(model_dir), "--yes"])
    assert done.exit_code
    said = done.output + str(done.exception)
    assert f"apollo-ipc train --offline (pid {os.getpid()}" in said
