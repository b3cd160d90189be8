"""Two stand-ins for vLLM on copies of one model: a learner's and a follower's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_model import Exporter, make_config, make_tiny_model
from trainer_by_hand import Trainer, with_train
from two_machines import Machines


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    model_dir = make_tiny_model(tmp_path / "there/model")
    copy = shutil.copytree(model_dir, tmp_path / "here/model")
    there = with_train(make_config(tmp_path / "there"), spike_ratio=0.0)
    here = make_config(tmp_path / "here")
    with (
        Exporter(model_dir, there.runtime_dir),
        Exporter(copy, here.runtime_dir) as served,
        Trainer(there) as one,
    ):
        yield Machines(one, model_dir, here, served)
