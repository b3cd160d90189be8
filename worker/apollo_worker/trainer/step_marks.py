"""Begin and end marks of training steps: what a worker that was killed leaves behind about its last step.

One page of a file, mapped: a store survives the death of this process, and nothing more is needed, since the
live weights that it speaks of do not outlive a power cut either. Tied to one boot of vLLM.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import msgspec

# boot_id, job_id's tail, begun, ended, loss of the step that ended, num_steps
_LAYOUT = struct.Struct("<32s24sQQdQ")


class LastStep(msgspec.Struct, frozen=True):
    """The last step that a worker began on the weights of vLLM boot `boot_id`."""

    boot_id: str
    job_id: str
    begun: int  # step number in its job, from 1
    ended: int  # equal to `begun` when the step's last write was done
    loss: float
    num_steps: int  # of the optimizer whose state is saved, all jobs together, up to `ended`

    @property
    def is_torn(self) -> bool:
        return self.begun != self.ended


class StepMarks:
    def __init__(self, path: Path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            self._page = mmap.mmap(fd, mmap.PAGESIZE)
        finally:
            os.close(fd)
        self.num_steps: int = _LAYOUT.unpack_from(self._page)[-1]  # after `clear` too

    def read(self) -> LastStep | None:
        boot, job, begun, ended, loss, num_steps = _LAYOUT.unpack_from(self._page)
        boot_id = boot.rstrip(b"\0").decode("ascii", "replace")
        if not boot_id:
            return None
        job_id = job.rstrip(b"\0").decode("ascii", "replace")
        return LastStep(boot_id, job_id, begun, ended, loss, num_steps)

    def begin(self, boot_id: str, job_id: str, step: int) -> None:
        self._write(boot_id, job_id, step, step - 1, 0.0)

    def end(self, boot_id: str, job_id: str, step: int, loss: float, *, is_counted: bool = True) -> None:
        """Only after the device has done the step's last write. is_counted: by the main optimizer."""
        self.num_steps += is_counted
        self._write(boot_id, job_id, step, step, loss)

    def clear(self, num_steps: int = 0) -> None:
        """No step is in the making, and the optimizer has done `num_steps`."""
        self.num_steps = num_steps
        self._page[: _LAYOUT.size] = _LAYOUT.pack(b"", b"", 0, 0, 0.0, num_steps)

    def _write(self, boot_id: str, job_id: str, begun: int, ended: int, loss: float) -> None:
        # One slice assignment; a kill between two of its bytes would need a kill inside memcpy of 88 bytes,
        # and then `begun` and `ended` differ or the job is unknown: both are read as torn.
        job = job_id.removeprefix("job-").encode()[:24]
        self._page[: _LAYOUT.size] = _LAYOUT.pack(
            boot_id.encode()[:32], job, begun, ended, loss, self.num_steps
        )

    def close(self) -> None:
        self._page.close()
