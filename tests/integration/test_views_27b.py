"""Qwen3.5-27B's full shapes on the meta device, by vLLM's own model class: every parameter has a view."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def derived() -> dict:
    env = {**os.environ, "VLLM_PLUGINS": "apollo", "HF_HUB_OFFLINE": "1"}
    config = HERE.parent / "assets" / "qwen3.5-27b"
    done = subprocess.run(
        [sys.executable, str(HERE / "views_on_meta.py"), str(config)],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_851_parameters_are_mapped(derived: dict) -> None:
    assert (derived["mapped"], derived["parameters"]) == (851, 851)
    assert derived["missing"] == []
    assert derived["refused"] == []


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "first_row"),
    [
        ("layers.0.linear_attn.in_proj_qkv", "layers.0.linear_attn.in_proj_qkvz", [10240, 5120], 0),
        ("layers.0.linear_attn.in_proj_z", "layers.0.linear_attn.in_proj_qkvz", [6144, 5120], 10240),
        ("layers.0.linear_attn.in_proj_b", "layers.0.linear_attn.in_proj_ba", [48, 5120], 0),
        ("layers.0.linear_attn.in_proj_a", "layers.0.linear_attn.in_proj_ba", [48, 5120], 48),
        ("layers.3.self_attn.q_proj", "layers.3.self_attn.qkv_proj", [12288, 5120], 0),
        ("layers.3.self_attn.k_proj", "layers.3.self_attn.qkv_proj", [1024, 5120], 12288),
        ("layers.3.self_attn.v_proj", "layers.3.self_attn.qkv_proj", [1024, 5120], 13312),
        ("layers.0.mlp.gate_proj", "layers.0.mlp.gate_up_proj", [17408, 5120], 0),
        ("layers.0.mlp.up_proj", "layers.0.mlp.gate_up_proj", [17408, 5120], 17408),
    ],
)
def test_the_known_merges_are_found(
    derived: dict, name: str, tensor: str, shape: list[int], first_row: int
) -> None:
    assert derived["views"][f"model.{name}.weight"] == [f"model.{tensor}.weight", shape, first_row * shape[1]]
