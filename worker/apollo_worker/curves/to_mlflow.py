"""Curves in MLflow: MLFLOW_TRACKING_URI, else a database in the state directory; MLFLOW_EXPERIMENT_NAME."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from apollo_worker.curves.keeper import PROJECT, Keeper, OpenRun, Point, Run

TAG = "apollo_ipc.run"
MAX_BATCH = 1000  # of MLflow's "log-batch": metrics a request
ENDED_BADLY = {"failed": "FAILED", "quarantined": "FAILED", "cancelled": "KILLED"}


def keeper(state_dir: Path) -> Keeper:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{state_dir / 'mlflow.db'}"
    return lambda run: MlflowRun(MlflowClient(uri), run)


class MlflowRun(OpenRun):
    def __init__(self, client: MlflowClient, run: Run):
        self._client = client
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else client.create_experiment(experiment)
        found = client.search_runs([experiment_id], f"tags.`{TAG}` = '{run.run_id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            histories = (client.get_metric_history(self._id, name) for name in found[0].data.metrics)
            self.last_step = max((point.step for history in histories for point in history), default=0)
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(experiment_id, tags={TAG: run.run_id}, run_name=run.name).info.run_id
            params = [Param(name, str(value)) for name, value in run.facts.items()]
            client.log_batch(self._id, params=params)
            self.last_step = 0

    def add(self, points: Sequence[Point]) -> None:
        at = int(time.time() * 1000)
        metrics = [
            Metric(name, value, at, point.step) for point in points for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), MAX_BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + MAX_BATCH])

    def close(self, ended: str | None) -> None:
        if ended is not None:
            self._client.set_terminated(self._id, ENDED_BADLY.get(ended, "FINISHED"))
