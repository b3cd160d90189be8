"""What soak.py does inside the trainer: each Python process with this folder on its path imports it first.

A file APOLLO_SOAK_HOOKS/raise holds `LAYER NUMBER`: the next trainer call number NUMBER of that layer raises,
once, and its name is added to APOLLO_SOAK_HOOKS/raised. A job whose first token is APOLLO_SOAK_POISON ends
the process inside its step.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path

LOOK_S = 0.02
LAST = "apollo_worker.trainer.loop"  # by then everything below it is there


class Hook:
    """Finds that module as everyone does, and installs the faults behind it."""

    def find_spec(self, name, path=None, target=None):
        if name != LAST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            install(Path(os.environ["APOLLO_SOAK_HOOKS"]))

        spec.loader.exec_module = exec_module
        return spec


def install(directory: Path) -> None:
    import pytest
    from apollo_worker.step.step import Trainer
    from faults import Faults

    class Once(Faults):
        """Raises at one call that comes up, while all goes on."""

        def __init__(self):
            super().__init__()
            self.layer, self.left = "", 0

        def reach(self, kind, error):
            if not self.left or not kind.startswith(self.layer):
                return
            with self._lock:
                self.left -= 1
                if self.left:
                    return
            with (directory / "raised").open("a") as file:
                file.write(f"{kind}\n")
            raise error()

        def wait(self):
            order = directory / "raise"
            while True:
                if order.exists():
                    layer, _, number = order.read_text().rpartition(" ")
                    order.unlink()
                    self.layer, self.left = layer, int(number)
                time.sleep(LOOK_S)

    faults, step_on = Once(), Trainer.step_on

    def poisoned(trainer, examples, *args, **kwargs):
        if examples[0].input_ids[0] == int(os.environ["APOLLO_SOAK_POISON"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return step_on(trainer, examples, *args, **kwargs)

    Trainer.step_on = poisoned
    faults.install(pytest.MonkeyPatch())
    threading.Thread(target=faults.wait, daemon=True).start()


if "APOLLO_SOAK_HOOKS" in os.environ and "apollo_worker.trainer" in sys.orig_argv:
    sys.meta_path.insert(0, Hook())
