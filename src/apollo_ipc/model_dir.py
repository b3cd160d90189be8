"""What people give as MODEL_DIR, and what they should have given."""

from __future__ import annotations

import os
from pathlib import Path

from apollo_ipc.errors import UserError


def check_is_dir(path: Path) -> Path:
    """Its absolute path. Raises UserError, with advice, unless it is a directory."""
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise UserError(f"{path} is a file; give the directory, {path.parent}", field="MODEL_DIR")
    advice = ""
    if len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists():
        advice = f"; a model of the Hub has to be fetched first: hf download {path} --local-dir {path.name}"
    raise UserError(f"{path}: no such directory{advice}", field="MODEL_DIR")


def check_model_dir(path: Path) -> Path:
    """Its absolute path. Raises UserError, with advice, unless vLLM could load a model there and a sync could
    write there: a config.json, weights as safetensors, and the right to write."""
    path = check_is_dir(path)
    if not (path / "config.json").exists():
        snapshots = sorted(path.glob("snapshots/*/config.json")) + sorted(path.glob("*/config.json"))
        advice = f"; did you mean {snapshots[0].parent}?" if snapshots else ": is it a model's directory?"
        raise UserError(f"{path} has no config.json{advice}", field="MODEL_DIR")
    if not any(path.glob("*.safetensors")):
        other = next((file.name for end in ("*.bin", "*.gguf", "*.pt") for file in path.glob(end)), None)
        raise UserError(
            f"{path} has no safetensors, but {other}: load it with transformers and save_pretrained it"
            if other
            else f"{path} has no weights (*.safetensors): is the download complete?",
            field="MODEL_DIR",
        )
    if not os.access(path, os.W_OK):
        raise UserError(
            f"{path} is not writable for this user, and training is saved there: make a copy of your own",
            field="MODEL_DIR",
        )
    return path
