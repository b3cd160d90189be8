"""`apollo-ipc checkpoint ...`: the model directory, which is the checkpoint (older ones: versions.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import describe_ago, describe_sync, print_json
from apollo_ipc.config import load_config
from apollo_ipc.errors import UserError
from apollo_ipc.manifest import read_manifest
from apollo_ipc.model_dir import check_is_dir
from apollo_ipc.process.progress import progress
from apollo_ipc.wire.messages import SyncCheckpoint

SYNC_TIMEOUT_S = 3600.0

app = typer.Typer(help="The model directory, which is the checkpoint.", no_args_is_help=True)

ModelDir = Annotated[
    Path | None, typer.Argument(metavar="MODEL_DIR", help="Default: the model that is served now.")
]


def find_model_dir(given: Path | None, config_file: Path | None) -> Path:
    if given is not None:
        return check_is_dir(given)
    manifest = read_manifest(load_config(config_file).runtime_dir)
    if manifest is None:
        raise UserError("no model is being served, so name the directory", field="MODEL_DIR")
    return Path(manifest.model_path)


@app.command()
def sync(
    is_delta: Annotated[
        bool, typer.Option("--delta", help="Write only what differs; the shards stay as they are.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Write the live weights into the model directory now."""
    from apollo_ipc.wire.client import call

    socket_path = load_config(config_file).socket_path
    request = SyncCheckpoint("", "delta" if is_delta else "full")
    with progress("the worker writes the checkpoint"):
        result = call(socket_path, request, timeout_s=SYNC_TIMEOUT_S).sync
    assert result is not None
    if as_json:
        print_json(result)
    else:
        print(describe_sync(result))


@app.command()
def verify(model_dir: ModelDir = None, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Read every tensor and compare it with the digest that the last sync recorded."""
    from apollo_ipc import checkpoint

    path = find_model_dir(model_dir, config_file)
    with progress(f"reading {path}") as doing:
        problems = checkpoint.verify(path, lambda done, total: doing(f"reading {path}", done, total))
    num_rounded, num_f32 = (0, 0) if problems else checkpoint.rounded(path)
    if as_json:
        told = {"model_dir": str(path), "ok": not problems, "problems": problems}
        print_json({**told, "num_f32": num_f32, "num_rounded": num_rounded})
    else:
        for problem in problems:
            print(": ".join(part for part in (problem.shard, problem.tensor, problem.message) if part))
        print(f"{path}: {f'{len(problems)} problems' if problems else 'every digest is right'}")
        if num_rounded:
            print(
                f"{num_rounded} of {num_f32} F32 tensors hold values of bf16 only: a sync rounds what was "
                "trained to what is served"
            )
    raise typer.Exit(1 if problems else 0)


@app.command()
def recover(model_dir: ModelDir = None, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Finish a sync that a crash interrupted after its commit, throw away one that it interrupted before."""
    from apollo_ipc import checkpoint

    path = find_model_dir(model_dir, config_file)
    with progress(f"recovering {path}"):
        recovery = checkpoint.recover(path)
    if as_json:
        print_json(recovery)
    elif not recovery:
        print(f"{path}: in order, nothing to do")
    else:
        if recovery.finished_version is not None:
            print(f"{path}: finished the sync of weight version {recovery.finished_version}")
        if recovery.folded_version is not None:
            print(f"{path}: worked the delta of weight version {recovery.folded_version} into the shards")
        for name in recovery.removed:
            print(f"{path}: removed {name}")


@app.command()
def show(model_dir: ModelDir = None, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """What the last sync recorded."""
    from apollo_ipc import checkpoint

    path = find_model_dir(model_dir, config_file)
    commit = checkpoint.read_commit(path)
    if as_json:
        print_json(commit)
    elif commit is None:
        print(f"{path}: never synced: the weights are the ones that were put there")
    else:
        print(
            f"{path}: weight version {commit.weight_version}, written {describe_ago(commit.committed_at)}, "
            f"{len(commit.tensors)} tensors in {len(commit.shards)} shards, "
            f"{'with' if commit.optimizer else 'without'} optimizer state"
            f"{', of which the last changes in a delta' if commit.delta else ''}"
        )
