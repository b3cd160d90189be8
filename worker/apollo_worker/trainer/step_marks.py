"""What a trainer that was killed leaves behind about the live weights: step.marks and state.json.

The marks are one page of a file, mapped: a store survives the death of this process, and nothing more is
needed, since the live weights that it speaks of do not outlive a power cut either. Tied to one boot of vLLM.
A mark that is begun and not ended is torn: the weights are neither those of before nor those of after. While
one stands there is no other step, no sync and no new weight version (TornWeights).
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import msgspec
import xxhash

from apollo_ipc.errors import ApolloError, AttachError
from apollo_ipc.sealed import Damaged, seal, unseal

WRITE_BACK = "write-back"  # stands for a job's id in the mark of a write that is no step

# boot_id, job_id's tail, begun, ended, loss of the step that ended, num_steps; then their digest, which an
# older program leaves out.
_LAYOUT = struct.Struct("<32s24sQQdQ")
_DIGEST = struct.Struct("<Q")
_SIZE = _LAYOUT.size + _DIGEST.size


class TornWeights(ApolloError):
    """The live weights are half written; only a write-back from the checkpoint mends them."""

    code = "torn_weights"


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
        # After `clear` too; of damaged marks, whose write-back sets it.
        self.num_steps: int = 0 if self._is_damaged() else _LAYOUT.unpack_from(self._page)[-1]

    @property
    def is_blank(self) -> bool:
        """No program has written here yet, or what it wrote is gone."""
        return not any(self._page[:_SIZE])

    def _is_damaged(self) -> bool:
        (digest,) = _DIGEST.unpack_from(self._page, _LAYOUT.size)
        return digest not in (0, _digest(self._page[: _LAYOUT.size]))

    def read(self) -> LastStep | None:
        """The marks of a damaged page are torn, of no known boot."""
        if self._is_damaged():
            return LastStep("", WRITE_BACK, 1, 0, 0.0, 0)
        boot, job, begun, ended, loss, num_steps = _LAYOUT.unpack_from(self._page)
        boot_id = boot.rstrip(b"\0").decode("ascii", "replace")
        if not boot_id:
            return None
        job_id = job.rstrip(b"\0").decode("ascii", "replace")
        return LastStep(boot_id, job_id, begun, ended, loss, num_steps)

    @property
    def is_torn(self) -> bool:
        last = self.read()
        return last is not None and last.is_torn

    def check_whole(self) -> None:
        """Raises TornWeights."""
        if self.is_torn:
            raise TornWeights(
                "a write of the live weights was cut off; the next trainer restores the last checkpoint"
            )

    def begin(self, boot_id: str, job_id: str, step: int) -> None:
        """Before the first write of a step. Raises TornWeights."""
        self.check_whole()
        self._write(boot_id, job_id, step, step - 1, 0.0)

    def begin_write_back(self, boot_id: str) -> None:
        """Before the first write that is no step. A torn step's own mark says as much, and is kept."""
        last = self.read()
        if last is None or not last.is_torn or last.boot_id != boot_id:
            self._write(boot_id, WRITE_BACK, 1, 0, 0.0)

    def end(self, boot_id: str, job_id: str, step: int, loss: float, *, is_counted: bool = True) -> None:
        """Only after the device has done the step's last write. is_counted: by the main optimizer."""
        self.num_steps += is_counted
        self._write(boot_id, job_id, step, step, loss)

    def clear(self, num_steps: int = 0) -> None:
        """No step is in the making, and the optimizer has done `num_steps`."""
        self.num_steps = num_steps
        self._put(_LAYOUT.pack(b"", b"", 0, 0, 0.0, num_steps))

    def _write(self, boot_id: str, job_id: str, begun: int, ended: int, loss: float) -> None:
        job = job_id.removeprefix("job-").encode()[:24]
        self._put(_LAYOUT.pack(boot_id.encode()[:32], job, begun, ended, loss, self.num_steps))

    def _put(self, marks: bytes) -> None:
        # A kill between two bytes leaves what its digest is not of: read as torn.
        self._page[:_SIZE] = marks + _DIGEST.pack(_digest(marks))

    def close(self) -> None:
        self._page.close()


def _digest(marks: bytes) -> int:
    """Never 0, which stands for none."""
    return xxhash.xxh3_64_intdigest(marks) or 1


class LiveState(msgspec.Struct, frozen=True):
    """model_dir: the model that this state directory's jobs belong to; boot_id: the vLLM last attached to;
    weight_version: the newest version published to it."""

    model_dir: str
    boot_id: str
    weight_version: int


def read_state(state_dir: Path) -> LiveState | None:
    path = state_dir / "state.json"
    try:
        return unseal(path.read_bytes(), LiveState)
    except FileNotFoundError:
        return None
    except Damaged as error:
        raise AttachError(f"{path} is damaged ({error}); see docs/operations.md on what it holds") from None


def write_state(state_dir: Path, state: LiveState) -> None:
    """By rename; flushed first, or a power cut could leave an empty file under the name."""
    temporary = state_dir / f".state.json.{os.getpid()}"
    with temporary.open("wb") as file:
        file.write(seal(state))
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, state_dir / "state.json")


def check_same_model(state: LiveState | None, model_dir: str, state_dir: Path) -> None:
    """Raises AttachError when the jobs in `state_dir` were made for another model: replayed there, they would
    train the wrong one."""
    if state is not None and state.model_dir != model_dir:
        raise AttachError(
            f"the state directory {state_dir} belongs to the model {state.model_dir}, but vLLM serves "
            f"{model_dir}; give this model a state directory of its own (paths.state_dir or --state-dir)"
        )
