"""`python -m apollo_worker --config FILE`: the worker under systemd or `apollo-ipc serve`."""

from __future__ import annotations

import os

# Before torch is loaded, which starts OpenMP: a spinning thread would take the CPU from serving.
for _name, _value in (("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0"), ("KMP_BLOCKTIME", "0")):
    os.environ.setdefault(_name, _value)

import argparse
import logging
import signal
import sys
from pathlib import Path

from apollo_ipc.config import load_config
from apollo_ipc.errors import ApolloError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m apollo_worker", description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--runtime-dir")
    parser.add_argument("--state-dir")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        config = load_config(
            options.config,
            {"paths.runtime_dir": options.runtime_dir, "paths.state_dir": options.state_dir},
        )
        from apollo_worker.worker import TrainingWorker

        worker = TrainingWorker(config)

        def stop(number: int, frame: object) -> None:
            worker.shared.stopping.set()
            worker.shared.wake.set()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        worker.run()
    except ApolloError as error:
        print(f"apollo_worker: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
