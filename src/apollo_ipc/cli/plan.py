"""`apollo-ipc plan`: how much memory training a model needs beside vLLM, before anything is started."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Column, Table

from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, describe_bytes, print_json
from apollo_ipc.config import load_config
from apollo_ipc.errors import ConfigError, UserError
from apollo_ipc.memory_plan import VLLM_UTILIZATION, Item, MemoryPlan, plan_command, read_plan
from apollo_ipc.model_dir import check_is_dir
from apollo_ipc.process.progress import progress

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
MIN_DEVICE_BYTES = 10**6  # below it a unit was forgotten


def plan(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Needs a config.json, no weights.")],
    rank: Annotated[int | None, typer.Option(help="Rank of APOLLO's projection.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of the longest example.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Examples an update.")] = None,
    rounding: Annotated[Literal["stochastic", "nearest", "kahan"] | None, typer.Option()] = None,
    activation_checkpointing: Annotated[
        bool | None, typer.Option("--activation-checkpointing/--no-activation-checkpointing")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="vLLM's share of the device.")
    ] = VLLM_UTILIZATION,
    device_memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Of the GPU to plan for, e.g. 141GB; default: this one's."),
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Processes of vLLM that share the model, a GPU each.")
    ] = 1,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Say what training a model needs beside vLLM, and whether it fits: exit status 0, else 1.

    From the shapes in config.json; what no flag says comes from the configuration.
    """
    path = check_is_dir(model_dir)
    if not (path / "config.json").exists():
        raise UserError(f"{path} has no config.json: give a model's directory", field="MODEL_DIR")
    if not 0 < gpu_memory_utilization <= 1:
        raise UserError(
            f"{gpu_memory_utilization:g} is no share; give one above 0, at most 1, e.g. 0.75",
            field="--gpu-memory-utilization",
        )
    if tensor_parallel_size < 1:
        raise UserError(
            f"{tensor_parallel_size} processes cannot serve; give 1 or more", field="--tensor-parallel-size"
        )
    flags = {
        "rank": ("--rank", rank),
        "max_tokens": ("--max-tokens", max_tokens),
        "accumulate_steps": ("--accumulate", accumulate),
        "rounding": ("--rounding", rounding),
        "activation_checkpointing": ("--activation-checkpointing", activation_checkpointing),
    }
    request = {
        "model_dir": str(path),
        "options": _train_options(config_file, flags),
        "utilization": gpu_memory_utilization,
        "device_bytes": parse_bytes(device_memory) if device_memory is not None else None,
        "num_ranks": tensor_parallel_size,
    }
    made = _run(request)
    if as_json:
        print_json(made)
    else:
        _print(made)
    raise typer.Exit(0 if made.fits else 1)


def parse_bytes(text: str) -> int:
    """`141GB`, `80 GiB` or plain bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGT]?I?)B?", text.strip().upper().replace("E", "e"))
    unit = (_UNITS | _BINARY_UNITS).get(match[2]) if match else None
    num_bytes = float(match[1]) * unit if match and unit else 0.0
    if not MIN_DEVICE_BYTES <= num_bytes < 2**63:
        raise UserError(
            f"{text!r} is no device's memory; give a size like 141GB or 80GiB", field="--device-memory"
        )
    return int(num_bytes)


def _train_options(config_file: Path | None, flags: dict[str, tuple[str, Any]]) -> Any:
    """[train] of the configuration with the flags in it. Raises UserError whose field is the flag."""
    load_config(config_file)  # what is wrong with the file itself is not the flags' fault
    for key, (flag, value) in flags.items():
        try:
            load_config(config_file, {f"train.{key}": value})
        except ConfigError as error:
            right = error.message.rpartition(": ")[2]
            raise UserError(f"{value} is not what is needed: {right}", field=flag) from None
    return load_config(config_file, {f"train.{key}": value for key, (_, value) in flags.items()}).train


def _run(request: dict[str, Any]) -> MemoryPlan:
    with progress("computing a step on shapes alone"):
        done = subprocess.run(plan_command(request), stdout=subprocess.PIPE, check=False)
    return read_plan(done.stdout, done.returncode)


def _print(made: MemoryPlan) -> None:
    screen = console()
    screen.print(f"{made.model}: {made.num_parameters / 1e9:.3g} billion parameters, {made.dtype}")
    table = Table(Column(""), Column("memory", justify="right"), Column(""), box=None, pad_edge=False)

    def add(items: list[Item], indent: str) -> None:
        for item in items:
            table.add_row(indent + item.name, describe_bytes(item.bytes), item.note)

    table.add_row(f"vLLM, at {made.utilization:g}", describe_bytes(made.vllm_bytes), "")
    add(made.vllm, "  ")
    table.add_row("trainer", describe_bytes(made.trainer_bytes), "")
    for item in made.trainer:
        add([item], "  ")
        if item.name.startswith("one step"):
            add(made.step, "    ")
    table.add_row("together", describe_bytes(made.total_bytes), "")
    table.add_row("device", describe_bytes(made.device_bytes), made.device)
    screen.print(table)
    for text in made.assumptions:
        screen.print(f"- {text}")
    screen.print(_verdict(made))


def _verdict(made: MemoryPlan) -> str:
    if made.fits:
        return f"fits: {describe_bytes(made.device_bytes - made.total_bytes)} are left"
    if made.max_utilization is None:
        return "does not fit: weights and training together are more than the device has"
    return f"does not fit; it would with --gpu-memory-utilization {made.max_utilization:g}"
