"""benchmarks/gpu_transfer.py with a real vLLM and a real worker: only the bytes' way is not CUDA IPC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import BENCHMARKS

from apollo_ipc.process.serving import serves_on_cpu

HERE = Path(__file__).parent
NUM_UPDATES = 2

RUN = """
import functools, pathlib, sys
import gpu_transfer, gpu_transfer_peer
script, *arguments = sys.argv[1:]
env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "apollo,file_transfer"}
peer = gpu_transfer_peer.Peer("file", pathlib.Path(script), env)
options = gpu_transfer.parse_arguments(arguments)
figures = gpu_transfer.measure(options, functools.partial(gpu_transfer.run, peer=peer))
from gpu_transfer_report import show
show(figures)
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_updates_in_place_and_full_copies_are_measured_on_one_server(tmp_path: Path, short_dir: Path) -> None:
    if not serves_on_cpu():
        pytest.skip("this environment's vLLM is not the CPU build")
    plugin = tmp_path / "plugin" / "file_transfer-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: file-transfer\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nfile_transfer = file_transfer:register\n"
    )
    paths = [str(plugin.parent), str(HERE), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FILE_TRANSFER": str(tmp_path / "copy")}
    file = tmp_path / "figures.json"
    arguments = ["--rate", "2", "--seconds", "10", "--updates", str(NUM_UPDATES), "--train-tokens", "64"]
    arguments += ["--prompt-tokens", "16", "--output-tokens", "16", "--dir", str(short_dir)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(HERE / "file_transfer.py"), *arguments, "--json", str(file)],
        env=env, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert "problem" not in figures, figures["problem"]

    assert list(figures["load"]) == ["alone", "steps in place", "full copies"]
    for name, phase in figures["load"].items():
        assert phase["num_failed"] == 0, (name, phase["errors"])
        assert phase["num_requests"] == figures["load"]["alone"]["num_requests"] > 5
        assert phase["wait_max_s"] >= phase["ttft_p50_s"] > 0

    ours, copy = figures["in_place"], figures["full_copy"]
    assert ours["num_updates"] >= 1
    assert ours["num_steps"] >= 8
    assert 0 < ours["cache_drop_median_s"] <= ours["cache_drop_max_s"]
    assert copy["num_updates"] == NUM_UPDATES
    assert copy["bytes"] == figures["weight_bytes"]
    assert copy["bytes_per_s"] > 0
    parts = ("pause_s", "start_s", "describe_s", "update_s", "finish_s", "resume_s")
    assert sum(copy[part] for part in parts) <= copy["held_max_s"] * NUM_UPDATES
    assert copy["held_s"] <= copy["held_max_s"]
    assert copy["added_bytes"] >= copy["bytes"], "the copy is memory of the sender's own"

    # Training changed what is served, and the last full copy brought the checkpoint back: `run` compares.
    checkpoint, trained, restored = figures["served_logprob"].values()
    assert trained > checkpoint + 0.5
    assert restored == pytest.approx(checkpoint, abs=0.1 * (trained - checkpoint))
    assert "file, pause keep" in " ".join(done.stdout.split())
