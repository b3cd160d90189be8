"""`python -m apollo_worker --config FILE`: the worker under systemd or `apollo-ipc serve`.

This process is the front (apollo_worker.front.front); it starts the trainer (apollo_worker.trainer).
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

# transformers would load torch for a tokenizer: 335 MB and five seconds, part of them with the interpreter's
# lock held, in the process that must answer at once. Marked as absent, tokenizers do without it.
sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]

from apollo_ipc.config import load_config
from apollo_ipc.errors import ApolloError
from apollo_worker.front.front import Front
from apollo_worker.process import log_as


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m apollo_worker", description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--runtime-dir")
    parser.add_argument("--state-dir")
    options = parser.parse_args()
    log_as("front")
    try:
        config = load_config(
            options.config,
            {"paths.runtime_dir": options.runtime_dir, "paths.state_dir": options.state_dir},
        )
        front = Front(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: front.board.stopping.set())
        front.run()
    except ApolloError as error:
        print(f"apollo_worker: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
