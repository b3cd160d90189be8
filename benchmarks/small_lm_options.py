"""Options that finetune.py and online.py share. Without torch, so that --help is there at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    @property
    def name(self) -> str: ...


Choice = TypeVar("Choice", bound=Named)


def add_options(
    parser: argparse.ArgumentParser, choices: Sequence[Named], quick: dict, held_out: str
) -> None:
    """quick: what --quick sets; held_out: what the windows are from."""
    add = parser.add_argument
    add("--only", help=f"some of {', '.join(choice.name for choice in choices)}")
    add(
        "--quick",
        action="store_true",
        help="about a minute: " + ", ".join(f"{k} {v}" for k, v in quick.items()),
    )
    add("--layers", type=int, default=2, help="of the model (%(default)s)")
    add("--pretrain-steps", type=int, default=500, help="on the English, 16 windows each (%(default)s)")
    add("--eval-windows", type=int, default=48, help=f"of 128 bytes, from {held_out} (%(default)s)")
    add("--threads", type=int, default=1, help="of torch (%(default)s)")
    add("--cache", type=Path, help="directory of the pretrained model (XDG_CACHE_HOME/apollo-ipc/bench)")
    add("--json", type=Path, help="write the figures to this file")


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, choices: Sequence[Choice], quick: dict[str, Any]
) -> tuple[argparse.Namespace, list[Choice]]:
    """(the options, those of `choices` that --only names, in their own order)."""
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**quick)  # what is given beside it still holds
    args = parser.parse_args(argv)
    by_name = {choice.name: choice for choice in choices}
    names = [name.strip() for name in args.only.split(",")] if args.only else list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        kind = type(choices[0]).__name__.lower()
        parser.error(f"--only: no {kind} {', '.join(unknown)}; there are {', '.join(by_name)}")
    return args, [choice for name, choice in by_name.items() if name in names]
