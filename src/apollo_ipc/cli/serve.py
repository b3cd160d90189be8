"""`apollo-ipc serve`: vLLM with our two plugins, and the training worker beside it."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from apollo_ipc.cli.options import ConfigFile
from apollo_ipc.cli.processes import has_vllm, vllm_environment, worker_command, worker_environment
from apollo_ipc.config import Config, load_config, make_private_dir
from apollo_ipc.errors import AlreadyRunning, ConfigError, UserError
from apollo_ipc.keys import train_key
from apollo_ipc.manifest import is_running, read_manifest
from apollo_ipc.model_dir import check_model_dir
from apollo_ipc.process.notify import notify
from apollo_ipc.process.say import say
from apollo_ipc.process.serving import count_ranks, vllm_command
from apollo_ipc.process.supervise import Child, Supervisor

PROBE_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 1.0

# vLLM's flags under which there is no one copy of the weights to share, and why.
CANNOT_WORK = {
    "--enable-sleep-mode": "memory of sleep mode cannot be exported to another process",
    "--enable-cumem-allocator": "memory of this allocator cannot be exported to another process",
    "--quantization": "quantised weights are a derived copy, which training does not reach",
    "--cpu-offload-gb": "offloaded weights move between two memories",
    "--pipeline-parallel-size": "it was not tried; split the weights by --tensor-parallel-size",
    "--nnodes": "the worker reaches the memory of its own machine only",
    "--enable-eplb": "vLLM moves experts between its processes while it serves",
    "--data-parallel-size": "several copies of the weights are not supported",
}
# Flags that only `vllm serve` reads; we start the server behind it (vllm.entrypoints.openai.api_server).
IS_IGNORED = {"--api-server-count": "one API server is started"}
_SHORT = {
    "-q": "--quantization",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-asc": "--api-server-count",
}


def serve(
    context: typer.Context,
    model_dir: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="The model, trained in place. Comes before any flag.")
    ],
    config_file: ConfigFile = None,
    external_worker: Annotated[
        bool, typer.Option("--external-worker", help="The worker is run by somebody else (systemd).")
    ] = False,
    traffic_dir: Annotated[
        Path | None,
        typer.Option(
            "--learn-from-traffic",
            metavar="DIR",
            help="Record chat completions there, for the night to learn from; instead of traffic.directory.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve a model with vLLM and train it at the same time.

    Further flags are vLLM's own and go to it unchanged.
    """
    if str(model_dir).startswith("-"):
        raise UserError(f"the model's directory comes first, before {model_dir}", field="MODEL_DIR")
    if not has_vllm():
        raise ConfigError(
            "vLLM is not installed here: make setup, or pip install 'apollo-ipc[gpu]' (or [cpu])"
        )
    config = load_config(
        config_file, {"traffic.directory": str(traffic_dir.absolute()) if traffic_dir else None}
    )
    model_dir = check_model_dir(model_dir)
    flags = check_vllm_flags(context.args)
    check_front_end(os.environ)
    check_port_is_free(host, port)
    make_private_dir(config.runtime_dir)
    check_nobody_serves(config)
    if config.traffic.directory:
        make_private_dir(Path(config.traffic.directory))
    train_key(config)  # made now, so that whoever sees "ready" finds it

    command = vllm_command(model_dir, host, port, flags)
    environment = vllm_environment(config, config_file, count_ranks(flags))
    vllm = Child("vLLM", command, without_notify(environment))
    url = local_url(host, port, flags)
    environment = without_notify(vllm_environment(config, config_file)) | {"APOLLO_CURATION__URL": url}
    beside = []
    if not config.follow.source:
        beside.append(Child("the teacher", teacher_command(config_file), environment))
    if not external_worker:
        environment = without_notify(worker_environment(config, config_file))
        beside.append(Child("the worker", worker_command(config_file), environment))
    raise typer.Exit(Supervisor(vllm, *beside, on_tick=StartUp(url)).run())


def teacher_command(config_file: Path | None) -> list[str]:
    """Of the process that takes on what comes to POST /teach, a client of this server."""
    flags = ["--config", str(config_file.resolve())] if config_file else []
    return [sys.executable, "-m", "apollo_curation.teach", *flags]


def local_url(host: str, port: int, flags: list[str]) -> str:
    """Where processes of this machine reach the server."""
    scheme = "https" if any(flag == "--ssl-certfile" for flag, _ in _named(flags)) else "http"
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"


def without_notify(environment: dict[str, str]) -> dict[str, str]:
    """systemd hears from this process only."""
    return {
        k: v for k, v in environment.items() if k not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    }


# --- what can be wrong before anything starts ---


def check_vllm_flags(flags: list[str]) -> list[str]:
    """Raises UserError for a flag that contradicts ours; warns of those under which training cannot work."""
    for flag, value in _named(flags):
        if flag == "--model":
            raise UserError("the model is the directory given first", field=flag)
        if flag == "--load-format" and value != "apollo":
            raise UserError(
                "is apollo here, which loads like `auto` and then shares the weights; leave the flag out",
                field=flag,
            )
        if flag in CANNOT_WORK and value != "1":
            say(f"warning: with {flag} training will be refused: {CANNOT_WORK[flag]}")
        if flag in IS_IGNORED and value != "1":
            say(f"warning: {flag} has no effect: {IS_IGNORED[flag]}")
    return flags


def check_front_end(environ: Mapping[str, str]) -> None:
    """Raises ConfigError: vLLM's front end in Rust serves fixed routes, without /train."""
    if environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ConfigError(
            "that front end has no /train and drops no prefix cache for new weights; unset it",
            field="VLLM_USE_RUST_FRONTEND",
        )


def _named(flags: list[str]) -> list[tuple[str, str | None]]:
    """(flag, its value), spelt as vLLM's parser understands it: `--a_b=c`, `--a-b c`, `-tp 2`."""
    named = []
    for i, text in enumerate(flags):
        if text.startswith("-"):
            name, _, value = text.partition("=")
            name = _SHORT.get(name, name.replace("_", "-"))
            named.append((name, value or (flags[i + 1] if i + 1 < len(flags) else None)))
    return named


def check_port_is_free(host: str, port: int) -> None:
    """Raises UserError: vLLM would find out only after it has loaded the model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"{host}: {error.strerror}", field="--host") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}", field="--port") from None


def check_nobody_serves(config: Config) -> None:
    """Raises AlreadyRunning where a living vLLM has this runtime directory: its worker would be ours."""
    manifest = read_manifest(config.runtime_dir)
    if manifest is not None and is_running(manifest):
        raise AlreadyRunning(
            f"a vLLM (process {manifest.pid}, {manifest.model_path}) already shares its weights in "
            f"{config.runtime_dir}; stop it, or give this one a paths.runtime_dir of its own",
            field="paths.runtime_dir",
        )


# --- until it is ready ---


class StartUp:
    """Called again and again: asks GET /train/health and tells each change once, until it answers 200."""

    def __init__(self, url: str):
        self._url = url
        self._told: str | None = None
        self._is_ready = False
        self._next_at = time.monotonic()

    def __call__(self) -> None:
        if self._is_ready or time.monotonic() < self._next_at:
            return
        news = self._probe()
        self._next_at = time.monotonic() + PROBE_INTERVAL_S
        if news is not None and news != self._told:
            self._told = news
            say(news)

    def _probe(self) -> str | None:
        import httpx

        try:
            # The certificate is the user's own server's, and nothing secret is sent.
            answer = httpx.get(
                f"{self._url}/train/health", timeout=PROBE_TIMEOUT_S, verify=False, trust_env=False
            )
        except httpx.TransportError:
            return None
        if self._told is None:
            notify("READY=1")
        if answer.status_code == 404:
            return f"{self._url} serves, but WITHOUT /train: vLLM left our plugin out; its log above says why"
        if answer.status_code == 200:
            self._is_ready = True
            return f"ready: {self._url} (train key: `apollo-ipc key`)"
        try:
            reason = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = f"status {answer.status_code}"
        return f"{self._url} serves; no training yet: {reason}"
