"""What an older version of the weights says, read from its directory by a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.step import Trainer

from apollo_ipc.config import Train
from apollo_ipc.demo.models import make_model


def test_it_says_what_a_trainer_on_the_same_directory_says(tmp_path):
    model_dir = make_model(tmp_path / "m", "qwen3", dtype=torch.float32, num_hidden_layers=2, hidden_size=64)
    asked = [[1, 5, 9, 200], [7, 8]]
    done = subprocess.run(
        [sys.executable, "-m", "apollo_worker.commands.logprobs", str(model_dir)],
        input="".join(f"{json.dumps(ids)}\n" for ids in asked),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    trainer = Trainer(load_offline(model_dir), Train())
    for ids, values in zip(asked, said, strict=True):
        assert len(values) == len(ids) - 1
        # The same program on the same machine; its threads may add up in another order.
        assert values == pytest.approx(trainer.logprobs(ids).tolist(), abs=1e-5)
