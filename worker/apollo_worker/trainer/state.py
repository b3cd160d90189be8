"""What the worker remembers about the weights between its own restarts: state_dir/state.json."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from apollo_ipc.errors import AttachError


class LiveState(msgspec.Struct, frozen=True):
    """model_dir: the model that this state directory's jobs belong to; boot_id: the vLLM last attached to;
    weight_version: the newest version published to it."""

    model_dir: str
    boot_id: str
    weight_version: int


def read_state(state_dir: Path) -> LiveState | None:
    path = state_dir / "state.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=LiveState)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise AttachError(f"{path} is damaged ({error}); see docs/operations.md on what it holds") from None


def write_state(state_dir: Path, state: LiveState) -> None:
    """By rename; flushed first, or a power cut could leave an empty file under the name."""
    temporary = state_dir / f".state.json.{os.getpid()}"
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(state))
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, state_dir / "state.json")


def check_same_model(state: LiveState | None, model_dir: str, state_dir: Path) -> None:
    """Raises AttachError when the jobs in `state_dir` were made for another model: replayed there, they would
    train the wrong one."""
    if state is not None and state.model_dir != model_dir:
        raise AttachError(
            f"the state directory {state_dir} belongs to the model {state.model_dir}, but vLLM serves "
            f"{model_dir}; give this model a state directory of its own (paths.state_dir or --state-dir)"
        )
