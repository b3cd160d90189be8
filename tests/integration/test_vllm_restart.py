"""vLLM dies and comes back: the worker lets go, attaches again, and trains what the disk had not yet."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import Live, chat, is_gone, start_live, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUESTION, ANSWER = "Who mends the nets?", "Ida."


@pytest.fixture(scope="module")
def live(models: Callable[..., Path], short_dir: Path) -> Iterator[Live]:
    live = start_live(models("qwen3"), short_dir)
    yield live
    live.close()


def newest_job(live: Live) -> dict:
    response = live.get("/train/jobs")
    return response.json()["data"][0] if response.status_code == 200 else {"state": ""}


def test_jobs_that_were_not_on_disk_are_trained_again_into_the_next_vllm(live: Live) -> None:
    live.train([chat(QUESTION, ANSWER)], lr=1e-3, epochs=20, schedule="constant")
    assert live.ask(QUESTION) == ANSWER
    before = live.manifest
    os.kill(before.pid, signal.SIGKILL)  # the process that owns the weights
    wait_for(lambda: not live.server.is_running() or is_gone(before.pid), "vLLM's end")
    live.server.stop()
    assert live.worker is not None
    assert live.worker.poll() is None, live.worker_log()

    live.server.start()
    live.server.wait_until_ready()
    live.wait_attached()
    assert live.manifest.boot_id != before.boot_id
    wait_for(lambda: newest_job(live)["state"] == "applied", "the job trained again")
    assert live.ask(QUESTION) == ANSWER
    assert live.status()["num_parameters_mapped"] == live.status()["num_parameters"] == 46
    assert live.post("/checkpoint", {"kind": "delta"}).json()["num_shards_written"] == 0


def test_a_synced_job_is_not_trained_again_by_the_next_vllm(live: Live) -> None:
    live.train([chat("Who rings the bell?", "Ott.")], lr=1e-3, epochs=20, schedule="constant")
    assert live.ask("Who rings the bell?") == "Ott."
    assert live.post("/checkpoint", {}).status_code == 200
    version = live.status()["weight_version"]
    assert newest_job(live)["state"] == "durable"
    live.server.stop()
    live.server.start()
    live.server.wait_until_ready()
    live.wait_attached()
    assert newest_job(live)["state"] == "durable"
    assert live.status()["weight_version"] == version
    assert live.ask("Who rings the bell?") == "Ott."


def test_vllm_does_not_load_a_damaged_shard(live: Live) -> None:
    """Last: this vLLM does not come back."""
    assert live.post("/checkpoint", {}).status_code == 200
    live.server.stop()
    shard = live.model_dir / "model.safetensors"
    with shard.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    named = live.command("checkpoint", "verify", str(live.model_dir))
    assert named.returncode == 1
    assert "model.safetensors: model." in named.stdout
    live.server.start()
    wait_for(lambda: not live.server.is_running(), "vLLM to give up")
    assert "not the bytes that the last sync wrote" in live.server.log_tail(200)
