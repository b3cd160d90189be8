"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML configuration [default: $APOLLO_CONFIG]."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of words.")]
