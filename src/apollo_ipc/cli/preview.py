"""`apollo-ipc preview`: what would be trained of a file, without a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, print_json
from apollo_ipc.cli.processes import worker_environment
from apollo_ipc.config import load_config
from apollo_ipc.errors import ApolloError, UserError
from apollo_ipc.manifest import read_manifest
from apollo_ipc.model_dir import check_is_dir
from apollo_ipc.process.progress import progress
from apollo_ipc.process.say import say
from apollo_ipc.wire.replies import Previewed


def preview(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, one example a line.")],
    model_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The model's directory [default: the served one].")
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be trained: for each learned turn what vLLM gives the model, and what it learns to say.

    Exit status 1 where an example is refused.
    """
    config = load_config(config_file)
    if not file.exists():
        raise UserError(f"cannot read {file}: no such file", field="FILE")
    if model_dir is None:
        manifest = read_manifest(config.runtime_dir)
        if manifest is None:
            raise UserError("no model is served here: give one's directory", field="--model-dir")
        model_dir = Path(manifest.model_path)
    path = check_is_dir(model_dir)
    if not (path / "config.json").exists():
        raise UserError(f"{path} has no config.json: give a model's directory", field="--model-dir")
    command = [sys.executable, "-m", "apollo_worker.commands.preview", str(path), str(file.resolve())]
    with progress("loading the tokenizer"):
        ended = subprocess.run(command, stdout=subprocess.PIPE, env=worker_environment(config, config_file))
    try:
        shown = msgspec.json.decode(ended.stdout, type=list[Previewed])
    except msgspec.DecodeError:
        error = ApolloError("the preview ended before its time; what it said is above", code="preview_failed")
        error.exit_code = max(ended.returncode, 1)
        raise error from None
    if as_json:
        print_json(shown)
    else:
        for one in shown:
            _print(one)
    raise typer.Exit(int(any(one.error is not None for one in shown)))


def _print(one: Previewed) -> None:
    place = f"example {one.example}" + ("" if one.message is None else f", message {one.message}")
    if one.error is not None:
        say(f"{place}: refused: {one.error.field}: {one.error.message}")
        return
    count = f"{len(one.context_ids or [])} tokens read, {len(one.target_ids or [])} learned"
    screen = console()
    screen.print(Text(f"{place}: {count}", style="bold"))
    screen.print(Text.assemble((one.context or "", "dim"), (one.target or "", "bold green")))
    for note in one.notes:
        say(f"{place}: {note}")
