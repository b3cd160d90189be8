"""`apollo-ipc follow`: a server whose weights are another machine's, kept up with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from apollo_ipc.cli import serve
from apollo_ipc.cli.options import ConfigFile
from apollo_ipc.errors import UserError
from apollo_ipc.process.progress import progress
from apollo_ipc.process.say import say


def follow(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="The model directory that is trained: a path or URL.")
    ],
    into: Annotated[
        Path, typer.Option("--into", metavar="MODEL_DIR", help="This server's own; made where it is missing.")
    ],
    version: Annotated[
        int | None, typer.Option(min=0, help="Stay at this weight version of the source.")
    ] = None,
    interval_s: Annotated[
        float | None, typer.Option("--interval", metavar="SECONDS", help="Between two looks at the source.")
    ] = None,
    config_file: ConfigFile = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve another machine's model and take over each version that it commits, while requests go on.

    Nothing is trained here. Further flags are vLLM's own and go to it unchanged.
    """
    if "://" not in source:
        if not Path(source).is_dir():
            raise UserError(
                f"{source}: no such directory; give a path, or a URL like s3://bucket/model", field="SOURCE"
            )
        source = str(Path(source).resolve())
        if Path(source) == into.resolve():
            raise UserError("is the source itself; this server needs a directory of its own", field="--into")
    if not (into / "config.json").exists():
        copy_model(source, into)
    settings = {"SOURCE": source, "VERSION": version, "INTERVAL_S": interval_s}
    # For our own load_config and for every process that `serve` starts.
    os.environ |= {
        f"APOLLO_FOLLOW__{key}": str(value) for key, value in settings.items() if value is not None
    }
    serve.serve(context, into, config_file, host=host, port=port)


def copy_model(source: str, into: Path) -> None:
    """The model's own files, without its checkpoint's record. Raises UserError where there is no model, or
    `into` holds something else."""
    import fsspec

    if into.exists() and any(into.iterdir()):
        raise UserError(f"{into} has no config.json, and is not empty", field="--into")
    partly = into.with_name(f".{into.name}.copying")
    try:
        files: tuple[Any, str] = fsspec.core.url_to_fs(source)
        system, root = files[0], files[1].rstrip("/")
        found = [one for one in system.ls(root, detail=True) if one["type"] == "file"]
    except Exception as error:  # each protocol has errors of its own
        raise UserError(f"{source} cannot be read: {error}", field="SOURCE") from None
    if not any(one["name"].endswith("/config.json") for one in found):
        raise UserError(f"{source} has no config.json: is it a model's directory?", field="SOURCE")
    shutil.rmtree(partly, ignore_errors=True)
    partly.mkdir(parents=True)
    say(f"copying {source} into {into}")
    with progress("copying the model"):
        for one in found:
            system.get_file(one["name"], str(partly / one["name"].rpartition("/")[2]))
    if into.exists():
        into.rmdir()
    partly.rename(into)
