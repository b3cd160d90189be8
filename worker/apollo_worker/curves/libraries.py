"""The libraries that may keep curves, each imported by its own process alone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from apollo_ipc.config import CurveKeeper
from apollo_ipc.errors import ConfigError
from apollo_worker.curves.keeper import Keeper

NAMES: tuple[str, ...] = get_args(CurveKeeper)


def keeper_of(name: CurveKeeper, state_dir: Path) -> Keeper:
    """state_dir: where the library writes unless its own environment says otherwise. Raises ConfigError."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name, as wandb makes, is not the library
        raise ConfigError(f"{name} is not installed: pip install 'apollo-ipc[{name}]'", field="train.log_to")
    match name:
        case "tensorboard":
            from apollo_worker.curves.to_tensorboard import keeper
        case "wandb":
            from apollo_worker.curves.to_wandb import keeper
        case "mlflow":
            from apollo_worker.curves.to_mlflow import keeper
    return keeper(state_dir)
