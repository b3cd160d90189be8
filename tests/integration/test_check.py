"""`apollo-ipc check` on every architecture that we name, and on what it must refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ARCHITECTURES = ["qwen3.5", "qwen3", "qwen2", "llama", "mistral", "gemma", "phi3"]


def run_check(model_dir: Path, *flags: str) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "apollo_ipc", "check", str(model_dir), "--json", *flags],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.strip(), done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.vllm
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_parameter_is_mapped_equal_and_followed(models: Callable[..., Path], arch: str) -> None:
    status, result = run_check(models(arch))
    assert result["refused"] == []
    assert result["mapped"] == result["parameters"] > 0
    assert result["equal_to_checkpoint"] is True
    # bf16 keeps 8 bits: 0.004 of a log-probability of 1 nat, 0.03 of one of 8; a wrong tensor gives nats.
    assert result["max_logprob_difference"] < 0.1
    assert result["max_logprob_difference_after_change"] < 0.1
    assert status == 0


@pytest.mark.vllm
def test_prepacking_is_forced_off_in_fp32_too(models: Callable[..., Path]) -> None:
    """In fp32 vLLM's CPU backend packs every linear weight with oneDNN on any machine."""
    import torch

    status, result = run_check(models("qwen3", dtype=torch.float32), "--dtype", "float32")
    assert result["dtype"] == "float32"
    assert result["max_logprob_difference_after_change"] < 0.01
    assert status == 0


def test_a_directory_without_a_model_is_refused_in_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apollo_ipc", "check", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
