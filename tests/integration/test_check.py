"""`apollo-ipc check` on every architecture that we name, and on what it must refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

OTHERS = ["qwen3", "qwen2", "llama", "mistral", "gemma", "phi3"]  # than the one that we train


def assert_trainable(result: dict) -> None:
    assert result["refused"] == []
    assert result["mapped"] == result["parameters"] > 0
    assert result["equal_to_checkpoint"] is True
    # bf16 keeps 8 bits: 0.004 of a log-probability of 1 nat, 0.03 of one of 8; a wrong tensor gives nats.
    assert result["max_logprob_difference"] < 0.1
    assert result["max_logprob_difference_after_change"] < 0.1


@pytest.mark.vllm
def test_every_parameter_is_mapped_equal_and_followed(models: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apollo_ipc", "check", str(models("qwen3.5")), "--json"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.strip(), done.stderr[-3000:]
    assert_trainable(json.loads(done.stdout))
    assert done.returncode == 0


def check_here(model_dir: Path, *flags: str) -> dict:
    """In this interpreter: one of its own a model imports torch for as long as vLLM starts."""
    from apollo_worker.commands.check import check

    return msgspec.to_builtins(check(model_dir, list(flags)))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("arch", OTHERS)
def test_so_is_every_parameter_of_the_other_architectures(models: Callable[..., Path], arch: str) -> None:
    assert_trainable(check_here(models(arch)))


@pytest.mark.vllm
@pytest.mark.slow
def test_prepacking_is_forced_off_in_fp32_too(models: Callable[..., Path]) -> None:
    """In fp32 vLLM's CPU backend packs every linear weight with oneDNN on any machine."""
    import torch

    result = check_here(models("qwen3", dtype=torch.float32), "--dtype", "float32")
    assert_trainable(result)
    assert result["dtype"] == "float32"
    assert result["max_logprob_difference_after_change"] < 0.01


def test_a_directory_without_a_model_is_refused_in_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apollo_ipc", "check", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
