"""What the worker says of itself, on /metrics; and that dashboard and alerts ask for nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from apollo_router import worker_metrics
from apollo_router.worker_metrics import WorkerMetrics
from msgspec.structs import replace
from places import ROOT
from prometheus_client import REGISTRY
from router_harness import ONE
from waiting import wait_for

from apollo_ipc.wire.replies import Progress, Status, Tally

CONFIGS = ROOT / "configs"
ALERTS = CONFIGS / "prometheus" / "alerts.yml"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def status(boot_id="boot-1", **fields) -> Status:
    return Status(Progress("idle", 1), worker_boot_id=boot_id, worker_pid=1, num_queued=0, **fields)


@pytest.fixture
def metrics(tmp_path):
    metrics = WorkerMetrics(tmp_path)
    yield metrics
    metrics.close()


def test_a_trained_job_and_a_waiting_one_show_in_the_metrics(server, worker):
    worker.board.state.tally = Tally(num_steps=3, step_s={"forward": 1.5}, num_syncs=1, sync_bytes=100)
    worker.board.state.progress = Progress("idle", 1, loss=0.25)
    server.http.post("/train", json=ONE)
    worker.train_one()
    before = time.time()
    server.http.post("/train", json=ONE)
    wait_for(lambda: [value("apollo_jobs", state=state) for state in ("queued", "applied")] == [1, 1])
    assert value("apollo_jobs", state="failed") == 0
    assert 0 <= value("apollo_queue_age_seconds") <= time.time() - before
    assert value("apollo_train_loss") == 0.25
    assert value("apollo_worker_memory_bytes", process="front") > 1e6


def test_a_total_is_counted_once_and_that_of_a_new_worker_from_its_start(metrics):
    before = value("apollo_train_tokens_total"), value("apollo_train_step_seconds_total", phase="forward")
    for tokens in (100, 100, 150):
        metrics.show(status(tally=Tally(num_tokens=tokens, step_s={"forward": tokens / 10})))
    metrics.show(status("boot-2", tally=Tally(num_tokens=7)))
    assert value("apollo_train_tokens_total") - before[0] == 157
    assert value("apollo_train_step_seconds_total", phase="forward") - before[1] == 15


def test_of_two_servers_one_counts_and_the_other_goes_on_when_it_ends(metrics, tmp_path):
    other, before = WorkerMetrics(tmp_path), value("apollo_syncs_total")
    for one in (metrics, other):
        one.show(status(tally=Tally(num_syncs=4)))
    assert value("apollo_syncs_total") - before == 4
    metrics.close()
    other.show(status(tally=Tally(num_syncs=6)))
    assert value("apollo_syncs_total") - before == 6
    other.close()


def test_the_loss_stays_between_jobs(metrics):
    metrics.show(replace_progress(status(tally=Tally(num_steps=1)), loss=2.5))
    metrics.show(status(tally=Tally(num_steps=1)))
    assert value("apollo_train_loss") == 2.5


def replace_progress(shown: Status, **changes) -> Status:
    shown.progress = replace(shown.progress, **changes)
    return shown


# --- what is asked of them ---


def exported() -> set[str]:
    """Every name of ours that /metrics may have."""
    assert worker_metrics.jobs
    families = [family for family in REGISTRY.collect() if family.name.startswith("apollo_")]
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def of_vllm() -> set[str]:
    """From its source: importing it takes seconds."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.submodule_search_locations
    text = (Path(found.submodule_search_locations[0]) / "v1/metrics/loggers.py").read_text()
    return set(re.findall(r'name="(vllm:\w+)"', text))


def dashboard_queries() -> list[str]:
    dashboard = json.loads((CONFIGS / "grafana" / "apollo.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    others = [one["expr"] for one in dashboard["annotations"]["list"]]
    return [*panels, *others, *(one["query"] for one in dashboard["templating"]["list"])]


def alert_queries() -> list[str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_dashboard_and_alerts_ask_only_for_metrics_that_there_are():
    asked = [name for query in dashboard_queries() for name in re.findall(r"\bapollo_\w+", query)]
    alerted = [name for query in alert_queries() for name in re.findall(r"\bapollo_\w+", query)]
    assert len(set(asked)) > 15
    assert len(set(alerted)) > 8
    assert set(asked) | set(alerted) <= exported()


def test_the_dashboard_asks_vllm_for_what_it_has():
    asked = {name for query in dashboard_queries() for name in re.findall(r"vllm:\w+", query)}
    assert asked
    assert {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in asked} <= of_vllm()


def test_the_page_of_metrics_names_every_one():
    text = (ROOT / "docs" / "http.md").read_text()
    kinds = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()}
    assert {name for name in kinds if name not in text} == set()


def test_every_alert_is_named_in_operations():
    text = (ROOT / "docs" / "operations.md").read_text()
    names = re.findall(r"alert: (\w+)", ALERTS.read_text())
    assert {name for name in names if name not in text} == set()


def test_promtool_takes_the_rules_and_they_fire_when_they_should(tmp_path):
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool here; on Debian `apt-get install prometheus`")
    for file in (ALERTS, ROOT / "tests" / "assets" / "alerts-test.yml"):
        shutil.copy(file, tmp_path)
    for check in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts-test.yml"]):
        done = subprocess.run([promtool, *check], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_to_say_of_our_names(metrics):
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool here; on Debian `apt-get install prometheus`")
    metrics.show(status(num_jobs={"queued": 1}, memory_bytes={"front": 1}))
    code = (
        "import apollo_router.metrics, apollo_router.worker_metrics, sys; "
        "from prometheus_client import REGISTRY, generate_latest; "
        "[REGISTRY.unregister(one) for one in list(REGISTRY._collector_to_names) if not "
        "getattr(one, '_name', '').startswith('apollo_')]; sys.stdout.buffer.write(generate_latest())"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout
    assert b"apollo_torn_steps_total" in text
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b""), done.stdout + done.stderr
