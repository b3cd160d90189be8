"""Who writes to a model directory for longer than one transaction: one process at a time."""

from __future__ import annotations

import errno
from pathlib import Path

from apollo_ipc.checkpoint.record import STATE_DIR
from apollo_ipc.errors import CheckpointError
from apollo_ipc.hold import Held, Hold


def hold_model(model_dir: Path, what: str) -> Hold | None:
    """The lock on `model_dir`; what: this command. None: nobody may write there, so it needs none.

    For whoever has weights, or brings some, that are to replace those on disk; what only reads, or tidies up
    (recover), waits for the checkpoint's own lock (transaction.py). Raises CheckpointError naming the holder.
    """
    try:
        (model_dir / STATE_DIR).mkdir(exist_ok=True)
        return Hold(model_dir / STATE_DIR / "owner", what)
    except Held as held:
        raise CheckpointError(
            f"{held.who} works on the model directory {model_dir}: wait for its end, or stop it",
            code="model_held",
        ) from None
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return None
        raise CheckpointError(f"cannot lock {model_dir}: {error.strerror}") from error
