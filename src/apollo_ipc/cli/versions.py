"""`apollo-ipc checkpoint history | diff | restore | pin | forget | snapshot`: older versions, and copies."""

from __future__ import annotations

import os
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from apollo_ipc.cli.checkpoint import ModelDir, find_model_dir
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import describe_ago, describe_bytes, describe_undone, print_json
from apollo_ipc.config import Config, load_config
from apollo_ipc.errors import NotReady, UserError
from apollo_ipc.manifest import is_served
from apollo_ipc.process.progress import progress
from apollo_ipc.wire.messages import GetHistory, PinVersion, Reply, RestoreVersion
from apollo_ipc.wire.replies import PinResult

RESTORE_TIMEOUT_S = 3600.0
PIN_TIMEOUT_S = 900.0  # a sync may hold the checkpoint for minutes
MAX_TENSORS_SHOWN = 20

Directory = Annotated[Path | None, typer.Option("--model-dir", help="Default: the model that is served now.")]


def ask_worker(config: Config, model_dir: Path, message: PinVersion | GetHistory) -> Reply | None:
    """None where no worker runs for this directory: its files are there to be read and written."""
    from apollo_ipc.wire.client import call

    if not is_served(config.runtime_dir, model_dir):
        return None
    try:
        return call(config.socket_path, message, timeout_s=PIN_TIMEOUT_S)
    except NotReady as error:
        if error.code != "not_delivered":
            raise
        return None


def history(model_dir: ModelDir = None, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """The versions that can be restored, oldest first, and what keeping them takes."""
    from apollo_ipc.checkpoint.history import listing

    path = find_model_dir(model_dir, config_file)
    reply = ask_worker(load_config(config_file), path, GetHistory(""))
    found = reply.history if reply else listing(path)
    assert found is not None
    if as_json:
        print_json(found)
        return
    print("version  written           kind   jobs up to  notes")
    for one in found.versions:
        notes = ["the present one"] if one.is_present else []
        notes += [f"restored from {one.restored_from}"] if one.restored_from is not None else []
        notes += ["pinned"] if one.is_pinned else []
        notes += [] if one.has_optimizer else ["no optimizer state"]
        notes += ["before the first sync"] if not one.serial else []
        print(
            f"{one.weight_version:>7}  {describe_ago(one.committed_at):<16}  {one.kind:<5}  "
            f"{one.applied_seq:>10}  {', '.join(notes)}".rstrip()
        )
    print(f"{describe_bytes(found.history_bytes)} beside the present version")


def diff(
    a: Annotated[int, typer.Argument(metavar="A", help="A weight version of the history.")],
    b: Annotated[int, typer.Argument(metavar="B", help="Another one.")],
    model_dir: Directory = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What changed from version A to version B, tensor by tensor, the most changed ones first."""
    from apollo_ipc import checkpoint
    from apollo_ipc.checkpoint import history as versions

    path = find_model_dir(model_dir, config_file)
    commit = checkpoint.read_commit(path)
    if commit is None:
        raise UserError(f"{path}: nothing was synced here yet, so there are no versions")
    old, new = versions.find(commit, a), versions.find(commit, b)
    with progress(f"comparing versions {a} and {b}"):
        found = sorted(versions.diff(path, commit, old, new), key=lambda one: -(one.relative_norm or 0.0))
    num_changed, num_elements = (
        sum(one.num_changed for one in found),
        sum(one.num_elements for one in found),
    )
    if as_json:
        print_json({"a": a, "b": b, "num_tensors": len(commit.tensors), "tensors": found})
        return
    if not found:
        print(f"versions {a} and {b} hold the same weights")
        return
    print(f"{len(found)} of {len(commit.tensors)} tensors differ")
    print(f"{num_changed:,} of their {num_elements:,} elements")
    print("relative  elements  most steps  tensor")
    for one in found[:MAX_TENSORS_SHOWN]:
        norm = "-" if one.relative_norm is None else f"{one.relative_norm:.2e}"
        share = one.num_changed / one.num_elements
        print(f"{norm:>8}  {share:>8.1%}  {one.max_steps:>10}  {one.name}")
    if len(found) > MAX_TENSORS_SHOWN:
        print(f"... and {len(found) - MAX_TENSORS_SHOWN} more (--json lists them all)")


def restore(
    version: Annotated[int, typer.Argument(metavar="VERSION", help="A weight version of the history.")],
    model_dir: Directory = None,
    is_live: Annotated[
        bool, typer.Option("--live", help="Into the weights that vLLM is serving, too, by the worker.")
    ] = False,
    is_sure: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Write an older version back, as a new one: this step can be undone like any other."""
    from apollo_ipc import checkpoint
    from apollo_ipc.checkpoint.owner import hold_model

    config = load_config(config_file)
    path = find_model_dir(model_dir, config_file)
    is_now_served = is_served(config.runtime_dir, path)
    if is_live and not is_now_served:
        raise UserError(f"{path} is not being served; leave --live away", field="--live")
    if is_now_served and not is_live:
        raise UserError(
            "vLLM is serving this directory, and its next sync would write over what is restored; "
            "give --live to restore the served weights as well",
            field="--live",
        )
    if not is_sure:
        typer.confirm(f"Restore version {version} of {path}? Jobs trained since are undone", abort=True)
    if is_live:
        from apollo_ipc.wire.client import call

        with progress(f"the worker restores version {version}"):
            request = RestoreVersion("", version)
            result = call(config.socket_path, request, timeout_s=RESTORE_TIMEOUT_S).restore
        assert result is not None
        if as_json:
            print_json(result)
            return
        print(
            f"version {version} restored as version {result.weight_version} in {result.duration_s:.1f} s: "
            f"{result.num_tensors_changed} tensors changed, {describe_undone(result)}, "
            f"optimizer state {'of that version' if result.has_optimizer else 'starts anew'}"
        )
        return
    with hold_model(path, "apollo-ipc checkpoint restore") or nullcontext(), progress("restoring"):
        commit = checkpoint.restore_version(path, version, num_kept=config.checkpoint.history)
    if as_json:
        print_json({"restored_version": version, "weight_version": commit.weight_version})
    else:
        print(f"{path}: version {version} restored as version {commit.weight_version}")


def pin(
    version: Annotated[
        int | None, typer.Argument(metavar="VERSION", help="A weight version of the history.")
    ] = None,
    is_none: Annotated[bool, typer.Option("--none", help="Take the pin away.")] = False,
    model_dir: Directory = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep a version restorable however many syncs follow; one at a time. Also while it is served."""
    from apollo_ipc import checkpoint

    if (version is None) is not is_none:
        raise UserError("name either the VERSION to be pinned or --none", field="VERSION")
    path = find_model_dir(model_dir, config_file)
    with progress("a sync that runs is waited for"):
        reply = ask_worker(load_config(config_file), path, PinVersion("", version))
    done = reply.pin if reply else PinResult(str(path), version, checkpoint.pin_version(path, version))
    assert done is not None
    before = done.pinned_before
    if as_json:
        print_json(done)
    else:
        was = f" (before: {before})" if before is not None and before != version else ""
        print(f"{path}: {'no version' if version is None else f'version {version}'} is pinned{was}")


def forget(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR")],
    is_sure: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Take the shards as they are: remove every record of syncs, older versions and optimizer state."""
    from apollo_ipc import checkpoint
    from apollo_ipc.checkpoint.owner import hold_model

    path = find_model_dir(model_dir, config_file)
    if is_served(load_config(config_file).runtime_dir, path):
        raise UserError("vLLM is serving this directory; stop it first", field="MODEL_DIR")
    if not is_sure:
        typer.confirm(f"Remove all older versions and the optimizer state of {path}?", abort=True)
    with hold_model(path, "apollo-ipc checkpoint forget") or nullcontext():
        is_done = checkpoint.forget(path)
    print(f"{path}: {'forgotten' if is_done else 'there was nothing to forget'}")


def snapshot(context: typer.Context, model_dir: Directory = None, config_file: ConfigFile = None) -> None:
    """Run a command on a copy of the present version that stands still: `snapshot -- rsync -a {snapshot}/ X`.

    The copy has no bytes of its own (hard links); it is removed when the command ends, and the command's exit
    status is this one's. {snapshot}, {model_dir} and {weight_version} are filled in.
    """
    from apollo_ipc import checkpoint
    from apollo_ipc.checkpoint.snapshot import command_for

    if not context.args:
        raise UserError("a command is needed after --, for example: -- rsync -a {snapshot}/ /backup/model/")
    path = find_model_dir(model_dir, config_file)
    with checkpoint.snapshot(path) as taken:
        command, environment = command_for(context.args, taken, path)
        try:
            ended = subprocess.run(
                command, cwd=taken.path, env={**os.environ, **environment}, pass_fds=[taken.held_by]
            )
        except OSError as error:
            raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
    raise typer.Exit(ended.returncode)
