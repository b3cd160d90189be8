"""Keeps the trainer attached to the vLLM that is there; brings jobs and weights to one state each time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from apollo_ipc.checkpoint import Commit, is_current, read_commit, recover
from apollo_ipc.checkpoint.disk import DISK, ThrottledDisk
from apollo_ipc.checkpoint.shards import shard_index
from apollo_ipc.config import Config
from apollo_ipc.errors import ApolloError, AttachError, CheckpointError, UserError
from apollo_ipc.manifest import Manifest, read_manifest
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.jobs.tokenise import Tokeniser, load_tokeniser
from apollo_worker.link.link import ModelFacts
from apollo_worker.link.status_board import Shared
from apollo_worker.model.hf_model import vocab_size_of
from apollo_worker.model.live_model import LiveModel, attach
from apollo_worker.step.pace import Pace
from apollo_worker.step.step import Trainer
from apollo_worker.sync.optimizer_file import read_optimizer
from apollo_worker.sync.writer import CheckpointWriter
from apollo_worker.trainer.state import LiveState, check_same_model, read_state, write_state
from apollo_worker.trainer.step_marks import LastStep, StepMarks

log = logging.getLogger(__name__)
RETRY_S = 5.0  # between two attempts at the same vLLM


class Attachment:
    """live, trainer and writer are set while attached. tell_model: gets the facts at each attach."""

    def __init__(
        self,
        config: Config,
        shared: Shared,
        queue: JobQueue,
        marks: StepMarks,
        tell_model: Callable[[ModelFacts], None] = lambda facts: None,
    ):
        self._config, self._shared, self._queue, self._marks = config, shared, queue, marks
        self._tell_model = tell_model
        self.live: LiveModel | None = None
        self.trainer: Trainer | None = None
        self.writer: CheckpointWriter | None = None
        self.tokeniser: Tokeniser | None = None
        self._tried: tuple[str, float] | None = None  # the vLLM last tried, and when
        self._refused_boot: str | None = None  # a manifest that was refused is not tried again and again

    def ensure(self) -> bool:
        """True when attached to the vLLM that runs now. False: `shared.attach_error` says what is missing."""
        if self.live is not None and self.live.is_alive():
            return True
        if self.live is not None:
            log.warning("vLLM (boot %s) has ended; its weights are let go", self.live.boot_id[:8])
            self.detach("vLLM has ended; waiting for the next one")
        try:
            manifest = read_manifest(self._config.runtime_dir)
            if manifest is None:
                self._wait_for_vllm(
                    "vLLM has not started here yet (no weights manifest in the runtime directory)"
                )
            elif manifest.boot_id != self._refused_boot and self._may_try(manifest.boot_id):
                self._attach_or_detach(manifest)
        except ApolloError as error:
            # A checkpoint or optimizer file that cannot be read is waited for like a vLLM that is not there.
            self._wait_for_vllm(error.message, getattr(error, "refused", None))
        return self.live is not None

    def detach(self, reason: str) -> None:
        """Drops every view of the weights. Nothing is written to them any more."""
        self._shared.attached = False
        self._shared.attach_error = reason
        self._shared.vllm_boot_id = self._shared.vllm_pid = None
        if self.writer is not None:
            self.writer.wait(is_urgent=True)  # what was copied out is committed; its compaction can wait
        self.trainer = self.writer = None
        if self.live is not None:
            self.live.close()
            self.live = None

    def _wait_for_vllm(self, reason: str, refused: list[str] | None = None) -> None:
        if reason != self._shared.attach_error:
            log.info("not attached: %s", reason)
        self._shared.attach_error = reason
        self._shared.refused = refused or []

    def _may_try(self, boot_id: str) -> bool:
        """A vLLM at once, the same one again only after a while: an attempt may read the whole model."""
        now = time.monotonic()
        if self._tried is not None and self._tried[0] == boot_id and now - self._tried[1] < RETRY_S:
            return False
        self._tried = boot_id, now
        return True

    def _attach_or_detach(self, manifest: Manifest) -> None:
        try:
            self._attach(manifest)
        except BaseException:
            if self.live is not None:  # mapped, but not brought to one state with the jobs: never trained so
                self.detach("attaching failed")
            raise

    def _attach(self, manifest: Manifest) -> None:
        """Raises AttachError; one that will not go away without another vLLM is remembered by its boot_id."""
        config, shared = self._config, self._shared
        shared.show("attaching")
        before = read_state(config.state_dir)
        check_same_model(before, manifest.model_path, config.state_dir)
        model_dir = Path(manifest.model_path)
        is_new_boot = before is None or before.boot_id != manifest.boot_id
        # A vLLM that loads has worked the last delta in before; one written since stays beside the shards.
        recover(model_dir, is_folding=False)
        try:
            # Weights that were trained since vLLM loaded them differ from the disk, and rightly so.
            live = attach(manifest, verify=is_new_boot and config.worker.verify_checkpoint)
        except AttachError as error:
            if error.refused:
                self._refused_boot = manifest.boot_id
            raise
        self.live = live
        self.trainer = self._make_trainer(live)
        self.trainer.main_optimizer.warm_up()  # seconds, the first time ever: not in a job then
        self.writer = make_writer(live, config)
        self.tokeniser = read_tokeniser(live, config)
        self._tell_model(model_facts(live, self.trainer, self.tokeniser))
        commit = current_commit(model_dir)
        version = max(before.weight_version if before else 0, commit.weight_version if commit else 0)
        if is_new_boot:
            version += self._reconcile(commit)
        elif (last := self._marks.read()) is not None and last.boot_id == manifest.boot_id:
            version += self._mend_last_step(last)
        is_loaded = load_optimizer(self.trainer, model_dir, commit)
        # Steps since that commit: their weights are in vLLM's memory, their moments went with the worker.
        # Moments at zero begin with step 0, or the correction of their bias would take them for warm ones.
        if is_loaded and (num_lost := self._marks.num_steps - num_steps_of(commit)) > 0:
            self.trainer.main_optimizer.advance(num_lost)
        self.set_version(version)
        shared.durable_version = commit.weight_version if commit else 0
        shared.vllm_boot_id, shared.vllm_pid = manifest.boot_id, manifest.pid
        shared.model_path = manifest.model_path
        shared.num_parameters = shared.num_parameters_mapped = live.num_parameters
        shared.optimizer_state_bytes = self.trainer.optimizer.state_size_bytes()
        shared.attach_error, shared.refused = None, []
        shared.attached = True
        log.info(
            "attached to vLLM pid %d (boot %s): %d of %d parameters of %s, weight version %d",
            *(manifest.pid, manifest.boot_id[:8], live.num_parameters, live.num_parameters),
            *(manifest.model_path, version),
        )

    def _make_trainer(self, live: LiveModel) -> Trainer:
        pace = Pace(self._config.worker.pace, self._shared.stopping.is_set)
        return Trainer(live, self._config.train, pace)

    def set_version(self, version: int) -> None:
        assert self.live is not None
        self._shared.weight_version = version
        write_state(self._config.state_dir, LiveState(str(self.live.model_dir), self.live.boot_id, version))

    def _reconcile(self, commit: Commit | None) -> int:
        """The weights are those of the last commit: jobs after it are queued again. 1 if there were any."""
        self._marks.clear(num_steps_of(commit))
        running = (commit.extra.get("running") or {}) if commit else {}
        # Without a commit the directory holds none of our jobs, but those called durable were in one that
        # the user has replaced since: they are not trained into the new one unasked.
        durable = self._queue.list(limit=1, state="durable")
        applied_seq = commit.applied_seq if commit else (durable[0].seq if durable else 0)
        if commit is not None and commit.extra.get("queue_id") != self._queue.queue_id:
            log.warning("the checkpoint's record of jobs is of another queue file; it is not used")
            applied_seq, running = (durable[0].seq if durable else 0), {}
        lost = self._queue.reconcile(applied_seq, running.get("job_id"), running.get("steps_done", 0))
        again = [job for job in lost if job.state == "queued"]
        if again:
            jobs = "1 job was" if len(again) == 1 else f"{len(again)} jobs were"
            log.warning("%s in the lost weights only, not in the checkpoint: training again", jobs)
        return 1 if again else 0

    def _mend_last_step(self, last: LastStep) -> int:
        """After a crash of the worker alone. 1 where the weights had to be restored.

        A step that ended but was not recorded is recorded; one that did not end left weights that are neither
        before nor after it: they are restored from the last commit, and what came after it is trained again.
        """
        job = next(
            (j for j in self._queue.list(limit=1, state="running") if j.job_id.endswith(last.job_id)), None
        )
        if last.is_torn and self._config.train.on_torn_step == "accept" and job is not None:
            log.warning(
                "step %d of job %s was cut off; going on with the weights as they are (on_torn_step)",
                *(last.begun, last.job_id),
            )
            self._marks.clear(last.num_steps)
            return 1
        if last.is_torn:
            log.warning(
                "step %d of job %s was cut off; restoring the last checkpoint", last.begun, last.job_id
            )
            self.restore_last_commit()
            return 1
        if job is not None and last.ended == job.steps_done + 1:
            self._queue.record_step(job.job_id, last.ended, last.loss)
        return 0

    def restore_last_commit(self) -> None:
        """Live weights of the last checkpoint; jobs that it does not hold are queued again.

        Cut off, it is done again by the next trainer: the step's mark stays torn until the end.
        """
        assert self.live is not None
        recover(self.live.model_dir)
        commit = current_commit(self.live.model_dir)
        restore(self.live)
        self._reconcile(commit)
        if self.trainer is not None:
            self.trainer.close()
            self.trainer = self._make_trainer(self.live)
            load_optimizer(self.trainer, self.live.model_dir, commit)

    def undo_torn_step(self) -> None:
        """After an error inside a step (out of memory, a CUDA error): the same recovery as after a crash."""
        last = self._marks.read()
        if last is None or not last.is_torn or self.live is None:
            return
        self._mend_last_step(last)


def num_steps_of(commit: Commit | None) -> int:
    """Steps of the optimizer whose state is in `commit`."""
    return commit.extra.get("optimizer_steps", 0) if commit else 0


def load_optimizer(trainer: Trainer, model_dir: Path, commit: Commit | None) -> bool:
    """The moments of the last commit; anew, with a warning, where those do not fit or are damaged. Whether
    there were any."""
    try:
        if commit is not None and (saved := read_optimizer(model_dir, commit.optimizer)) is not None:
            trainer.main_optimizer.load_state(*saved)
            return True
    except (UserError, CheckpointError) as error:
        log.warning("the saved optimizer state is not used, moments start anew: %s", error.message)
    return False


def make_writer(live: LiveModel, config: Config) -> CheckpointWriter:
    limit = config.checkpoint.max_write_bytes_per_s
    return CheckpointWriter(
        live.model_dir,
        live.trained_tensors(),
        disk=ThrottledDisk(limit) if limit else DISK,
        num_kept=config.checkpoint.history,
        max_abs_limit=config.checkpoint.max_abs_weight,
    )


@torch.no_grad()
def restore(live: LiveModel | None) -> None:
    """Writes the shards on disk back into the live weights, in place. Recover them before."""
    assert live is not None
    index = shard_index(live.model_dir)
    for name, tensor in live.trained_tensors().items():
        if name in index:
            with safe_open(live.model_dir / index[name].shard, "pt") as shard:
                tensor.copy_(shard.get_tensor(name))


def current_commit(model_dir: Path) -> Commit | None:
    """The last commit, or None where there is none or the shards are not the ones that it left any more."""
    commit = read_commit(model_dir)
    if commit is not None and not is_current(model_dir, commit):
        log.warning(
            "%s: the shards were replaced since the commit of weight version %d; its optimizer state and its "
            "record of jobs are not used",
            *(model_dir, commit.weight_version),
        )
        return None
    return commit


def read_tokeniser(live: LiveModel, config: Config) -> Tokeniser:
    """Examples may be as long as both the configuration and the model's positions allow."""
    positions = getattr(live.model.config, "max_position_embeddings", None) or config.train.max_tokens
    return load_tokeniser(
        live.model_dir,
        vocab_size=vocab_size_of(live.model),
        max_tokens=min(config.train.max_tokens, positions),
    )


def model_facts(live: LiveModel, trainer: Trainer, tokeniser: Tokeniser) -> ModelFacts:
    return ModelFacts(
        model_dir=str(live.model_dir),
        vocab_size=tokeniser.vocab_size,
        max_tokens=tokeniser.max_tokens,
        smaller_dims=trainer.smaller_dims(),
    )
