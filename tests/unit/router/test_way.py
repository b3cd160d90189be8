"""docs/protocol.md, "The way of one example", against a job that takes it: each file runs in its process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from places import ROOT, SUPPORT
from router_harness import ONE, Server
from served_model import Exporter
from waiting import wait_for

from apollo_ipc.process.serving import worker_command

TRACING = SUPPORT / "tracing"


def the_way() -> dict[str, list[str]]:
    """Process -> its files."""
    text = (ROOT / "docs/protocol.md").read_text().partition("## The way of one example")[2]
    way: dict[str, list[str]] = {}
    for process, file in re.findall(r"^\| ([^|]*) \| `([^`]+)` \|", text, re.M):
        way.setdefault(process.strip() or list(way)[-1], []).append(file)
    return way


def ran(trace: Path) -> set[str]:
    return {str(Path(line).relative_to(ROOT)) for line in trace.read_text().splitlines()}


@pytest.mark.slow
def test_each_file_on_the_way_of_an_example_runs_in_its_process(tiny_model, config, tmp_path, monkeypatch):
    config.state_dir.mkdir(mode=0o700)
    model_dir = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    worker_trace, router_trace = tmp_path / "worker", tmp_path / "router"
    monkeypatch.syspath_prepend(TRACING)
    import sitecustomize as tracing  # this process started without it

    monkeypatch.setenv("APOLLO_TRACE", str(worker_trace))
    env = os.environ | {"PYTHONPATH": str(TRACING), "APOLLO_TRAIN__RANK": "8"}
    with Exporter(model_dir, config.runtime_dir), subprocess.Popen(worker_command(), env=env) as worker:
        try:
            monkeypatch.setenv("APOLLO_TRACE", str(router_trace))
            threading.setprofile(tracing.note)  # of the server's threads
            with Server() as server:
                threading.setprofile(None)
                wait_for(lambda: server.http.get("/train/health").status_code == 200, 300)
                job = server.http.post("/train?wait=true", json=ONE, timeout=300).json()
                assert job["status"] == "applied"
        finally:
            worker.terminate()
    traces = {name: ran(file) for file in tmp_path.glob("worker-*") for name in [process_of(ran(file))]}
    traces["vLLM's API server"] = set.union(*map(ran, tmp_path.glob("router-*")))
    way = the_way()
    assert way.keys() == traces.keys()
    assert {name: set(files) - traces[name] for name, files in way.items()} == {name: set() for name in way}
    assert sum(map(len, way.values())) < 30


def process_of(files: set[str]) -> str:
    return "worker, front" if "worker/apollo_worker/front/front.py" in files else "worker, trainer"
