"""What the benchmarks that train by hand share: the real model, served from a copy, and where figures go."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from apollo_ipc.demo.real_model import copy_real_model
from apollo_ipc.demo.served import ServedModel

Figures = dict[str, Any]
T = TypeVar("T")
AT_ONCE = 8  # requests, which vLLM batches


def all_at_once(ask: Callable[[str], T], things: Iterable[str]) -> list[T]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, things))


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    assert doc
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser


def run_served(
    name: str, args: argparse.Namespace, run: Callable[[argparse.Namespace, ServedModel], Figures]
) -> Figures:
    """What `run` finds on real vLLM with a worker; their files are in /tmp, and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=f"apollo-{name}-", dir="/tmp") as directory:
        base = Path(directory)
        with ServedModel(copy_real_model(base / "model"), base) as served:
            figures = run(args, served)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return figures
