"""A tiny model that transformers has saved, in one shard or in many, and what its files hold."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAST_MLP = "model.layers.1.mlp.down_proj.weight"


def save_model(model_dir: Path, *, shard_size: str, tied: bool = False) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=320,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(model_dir, max_shard_size=shard_size)
    return model_dir


def stored(model_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the shards, as safetensors' own reader sees it."""
    return {
        name: t for path in sorted(model_dir.glob("*.safetensors")) for name, t in load_file(path).items()
    }


def shard_of(model_dir: Path, tensor: str) -> Path:
    return next(path for path in model_dir.glob("*.safetensors") if tensor in load_file(path))


def shard_bytes(model_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_dir.glob("*.safetensors")}


def state_files(model_dir: Path) -> set[str]:
    return {path.name for path in (model_dir / ".apollo").iterdir()} - {"lock"}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_loads_as(model_dir: Path, live: dict[str, torch.Tensor]) -> None:
    """from_pretrained gives `live`, bit for bit."""
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).state_dict()
    assert loaded.keys() >= live.keys()
    for name, tensor in live.items():
        assert bits(loaded[name]) == bits(tensor), name
