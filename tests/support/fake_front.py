"""The real front with fake_trainer.py: python fake_front.py DIRECTORY SECONDS_PER_STEP STEP_TIMEOUT_S"""

# ruff: noqa: E402
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.modules["torch"] = None

from apollo_worker.front import trainer_process as trainer_child
from apollo_worker.front.front import Front
from apollo_worker.process import log_as

from apollo_ipc.config import load_config

if __name__ == "__main__":
    directory, step_s, step_timeout_s = sys.argv[1:]
    trainer_child.RESTART_AFTER_S = (0.3,)
    log_as("front")
    overrides = {
        "paths.runtime_dir": directory,
        "paths.state_dir": directory,
        "worker.step_timeout_s": float(step_timeout_s),
        "train.max_tokens": 16,
        "train.publish_distance_s": 0,
        "train.log_to": [name] if (name := os.environ.get("FAKE_FRONT_LOG_TO")) else [],
        "webhooks.urls": [url] if (url := os.environ.get("FAKE_FRONT_WEBHOOK")) else [],
    }
    trainer = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")), directory, step_s)
    front = Front(load_config(environ={}, overrides=overrides), trainer)
    signal.signal(signal.SIGTERM, lambda *_: front.board.stopping.set())
    front.run()
