"""Curves read back, by the libraries that wrote them: (step, value) of a run's tag."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Curve = list[tuple[int, float]]


def library(module: str) -> Any:
    """Skips the test where it is not installed."""
    extra = module.partition(".")[0]
    pytest.importorskip(extra, reason=f"pip install 'apollo-ipc[{extra}]' runs this test")
    return importlib.import_module(module)


def of_tensorboard(state_dir: Path, run: str, tag: str = "loss") -> Curve:
    reader = library("tensorboard.backend.event_processing.event_accumulator")
    to_array = library("tensorboard.util.tensor_util").make_ndarray
    directory = state_dir / "tensorboard" / run
    if not directory.is_dir():
        return []
    read = reader.EventAccumulator(str(directory), {reader.TENSORS: 0}).Reload()
    found = read.Tensors(tag) if tag in read.Tags()["tensors"] else []
    return [(one.step, float(to_array(one.tensor_proto))) for one in found]


def mlflow_run(uri: str, run: str) -> Any:
    """MLflow's own Run; None where there is none of that name."""
    client = library("mlflow.tracking").MlflowClient(uri)
    experiment = client.get_experiment_by_name("apollo-ipc")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return next((one for one in runs if one.info.run_name == run), None)


def of_mlflow(uri: str, run: str, tag: str = "loss") -> Curve:
    client, found = library("mlflow.tracking").MlflowClient(uri), mlflow_run(uri, run)
    history = client.get_metric_history(found.info.run_id, tag) if found else []
    return sorted((one.step, one.value) for one in history)


def of_wandb(directory: Path, run: str, tag: str = "loss") -> Curve:
    """Of offline runs in `directory`/wandb, by W&B's own message types; one folder after the other."""
    record_type = library("wandb.proto.wandb_internal_pb2").Record
    found = []
    for file in sorted(directory.glob(f"wandb/offline-run-*{run}/*.wandb")):
        for data in _records(file.read_bytes()):
            items = record_type.FromString(data).history.item
            values = {item.key or item.nested_key[0]: item.value_json for item in items}
            if tag in values:
                found.append((int(values["_step"]), float(values[tag])))
    return found


def _records(content: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format after 7 bytes, the last record perhaps still being written."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or kind == 0:
            at += left
            continue
        if at + 7 + size > len(content):
            return
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""
