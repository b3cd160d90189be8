"""What would be trained of a JSONL file: `python -m apollo_worker.commands.preview MODEL_DIR FILE`.

Prints one JSON list. Exit status 1 where an example is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from apollo_ipc.config import Config, load_config
from apollo_ipc.errors import ApolloError, UserError
from apollo_ipc.manifest import Serving, read_manifest
from apollo_ipc.wire.requests import Example, parse_example, parse_json
from apollo_worker.jobs.preview import preview
from apollo_worker.jobs.tokenise import Tokeniser, load_tokeniser


def read_lines(lines: list[bytes]) -> list[Example | UserError]:
    """The example of each line that is not blank, or what is wrong with it, with its path."""
    found: list[Example | UserError] = []
    for line in lines:
        if not line.strip():
            continue
        try:
            found.append(parse_example(parse_json(line)))
        except UserError as error:
            field = f"examples[{len(found)}].{error.field or ''}".rstrip(".")
            found.append(UserError(error.message, field=field.replace("].[", "][").replace("..", ".")))
    return found


def tokeniser_of(model_dir: Path, config: Config) -> Tokeniser:
    """As vLLM serves this directory, where one does; else as the directory alone says."""
    shape = json.loads((model_dir / "config.json").read_bytes())
    text = {**shape, **shape.get("text_config", {})}
    manifest = read_manifest(config.runtime_dir)
    is_served = manifest is not None and Path(manifest.model_path).resolve() == model_dir.resolve()
    positions = text.get("max_position_embeddings") or config.train.max_tokens
    return load_tokeniser(
        model_dir,
        vocab_size=text["vocab_size"],
        max_tokens=min(config.train.max_tokens, positions),
        serving=manifest.serving if manifest is not None and is_served else Serving(),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m apollo_worker.commands.preview", description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("file", type=Path, help="JSONL, one example a line")
    parser.add_argument("--config", type=Path)
    options = parser.parse_args(arguments)
    try:
        tokeniser = tokeniser_of(options.model_dir, load_config(options.config))
        shown = preview(tokeniser, read_lines(options.file.read_bytes().split(b"\n")))
    except ApolloError as error:
        print(f"apollo-ipc: {error.message}", file=sys.stderr)
        return error.exit_code
    print(msgspec.json.encode(shown).decode())
    return int(any(one.error is not None for one in shown))


if __name__ == "__main__":
    sys.exit(main())
