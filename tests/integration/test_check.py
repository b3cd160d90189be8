"""`apollo-ipc check` on every architecture that we name, on the real model, and on what it must refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from places import BENCHMARKS

from apollo_ipc.demo.real_model import copy_real_model

MIXTURES = ["qwen3_moe", "qwen3.5_moe", "mixtral", "gpt_oss", "olmoe", "glm4_moe", "granite_moe"]
OTHERS = ["qwen3", "qwen2", "llama", "mistral", "gemma", "phi3"]  # than the one that we train


def assert_trainable(result: dict, most: float = 1.6) -> None:
    assert result["refused"] == []
    assert result["mapped"] == result["parameters"] > 0
    assert result["equal_to_checkpoint"] is True
    for found in (result["agreement"], result["agreement_after_change"]):
        assert found["num_tokens"] == 12 * 63  # six texts, six times random ids
        if result["dtype"] == "bfloat16":
            # Two forward passes with roundings of one kind: neither is far nearer to fp32 than the other.
            assert 0.6 < found["served"]["mean"] / found["floor"]["mean"] < most


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


def check_here(model_dir: Path, *flags: str, log_file: Path | None = None) -> dict:
    """In this interpreter: one of its own a model imports torch for as long as vLLM starts."""
    from apollo_worker.commands.check import check

    return msgspec.to_builtins(check(model_dir, list(flags), log_file))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("arch", [*OTHERS, *MIXTURES])
def test_so_is_every_parameter_of_the_other_architectures(models: Callable[..., Path], arch: str) -> None:
    assert_trainable(check_here(models(arch)), most=2.5 if arch in MIXTURES else 1.6)


@pytest.mark.vllm
@pytest.mark.slow
def test_the_real_model_can_be_trained_live(real_model_dir: Path, tmp_path: Path) -> None:
    """Its log-probabilities differ from vLLM's by half a nat and more: roundings, as the floor says."""
    result = check_here(copy_real_model(tmp_path / "model"))
    assert_trainable(result)
    assert result["max_logprob_difference"] > 0.15
    assert result["notes"] == []


@pytest.mark.vllm
@pytest.mark.slow
def test_prepacking_is_forced_off_in_fp32_too(models: Callable[..., Path]) -> None:
    """In fp32 vLLM's CPU backend packs every linear weight with oneDNN on any machine."""
    import torch

    result = check_here(models("qwen3", dtype=torch.float32), "--dtype", "float32")
    assert_trainable(result)
    assert result["dtype"] == "float32"
    assert result["max_logprob_difference_after_change"] < 0.01


@pytest.mark.vllm
@pytest.mark.slow
def test_a_checkpoint_of_more_bits_than_are_served_is_said(models: Callable[..., Path]) -> None:
    import torch

    result = check_here(models("qwen3", dtype=torch.float32), "--dtype", "bfloat16")
    assert_trainable(result)
    assert [note.partition(":")[0] for note in result["notes"]] == [
        f"{result['parameters']} tensors are F32 on disk and served as bfloat16"
    ]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("model", ["real", "qwen3.5"])
def test_every_planted_fault_is_found_and_nothing_clean_is_refused(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import check_faults  # pyright: ignore[reportMissingImports]

    model_dir = copy_real_model(tmp_path / "model") if model == "real" else models(model)
    findings: list[Any] = check_faults.look_at_vllm(model_dir, num_clean=4, flags=[])
    assert sum(one.is_fault for one in findings) >= 40
    assert [one.name for one in findings if one.is_wrong] == []


@pytest.mark.vllm
@pytest.mark.slow
def test_without_shared_weights_the_reason_and_the_log_are_named(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that fails does not end vLLM: what it said stands in vLLM's log."""
    from apollo_ipc.errors import AttachError

    monkeypatch.setenv("APOLLO_TRAIN__LR", "fast")  # read by the export in vLLM's process
    with pytest.raises(AttachError) as caught:
        check_here(models("qwen3"), log_file=tmp_path / "vllm.log")
    assert "APOLLO_TRAIN__LR" in caught.value.message
    assert caught.value.message.endswith(f"vLLM's log: {tmp_path / 'vllm.log'}")


def test_a_directory_without_a_model_is_refused_in_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apollo_ipc", "check", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_is_kept_and_named_only_where_there_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apollo_worker.commands import check

    from apollo_ipc.errors import AttachError

    monkeypatch.setattr(check.tempfile, "tempdir", str(tmp_path))
    with check._vllm_log(None) as log:
        log.write_text("all is well")
    assert list(tmp_path.iterdir()) == []

    def fail() -> None:
        with check._vllm_log(None) as log:
            log.write_text("no memory")
            raise AttachError("vLLM ended")

    with pytest.raises(AttachError) as caught:
        fail()
    (log,) = tmp_path.glob("*/vllm.log")
    assert log.read_text() == "no memory"
    assert caught.value.message == f"vLLM ended\nvLLM's log: {log}"
