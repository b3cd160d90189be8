"""Keeps the trainer attached to the vLLM that is there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from apollo_ipc.checkpoint import Commit, recover
from apollo_ipc.checkpoint.disk import DISK, ThrottledDisk, WatchedDisk
from apollo_ipc.checkpoint.owner import hold_model
from apollo_ipc.config import Config
from apollo_ipc.errors import ApolloError, AttachError, CheckpointError, UserError
from apollo_ipc.hold import Hold
from apollo_ipc.manifest import Manifest, read_ranks
from apollo_worker.link.link import ModelFacts
from apollo_worker.link.status_board import StatusBoard
from apollo_worker.model.hf_model import vocab_size_of
from apollo_worker.model.live_model import LiveModel, attach
from apollo_worker.step.forward import max_tokens_of
from apollo_worker.step.step import Trainer
from apollo_worker.sync.optimizer_file import read_optimizer
from apollo_worker.sync.writer import CheckpointWriter
from apollo_worker.trainer.recovery import Recovery, current_commit
from apollo_worker.trainer.step_marks import check_same_model, read_state

log = logging.getLogger(__name__)
RETRY_S = 5.0  # between two attempts at the same vLLM


class Attachment:
    """live, trainer and writer are set while attached. tell_model: gets the facts at each attach."""

    def __init__(
        self,
        config: Config,
        board: StatusBoard,
        recovery: Recovery,
        tell_model: Callable[[ModelFacts], None] = lambda facts: None,
    ):
        self._config, self._board, self.recovery = config, board, recovery
        self._tell_model = tell_model
        self.live: LiveModel | None = None
        self.trainer: Trainer | None = None
        self.writer: CheckpointWriter | None = None
        self._hold: Hold | None = None  # on the model directory, whose next weights are the live ones
        self._tried: tuple[str, float] | None = None  # the vLLM last tried, and when
        self._refused_boot: str | None = None  # a manifest that was refused is not tried again and again

    def ensure(self) -> bool:
        """True when attached to the vLLM that runs now. False: `attach_error` says what is missing."""
        if self.live is not None and self.live.is_alive():
            return True
        if self.live is not None:
            log.warning("vLLM (boot %s) has ended; its weights are let go", self.live.boot_id[:8])
            self.detach("vLLM has ended; waiting for the next one")
        try:
            ranks = read_ranks(self._config.runtime_dir)
            if not ranks:
                self._wait_for_vllm(
                    "vLLM has not started here yet (no weights manifest in the runtime directory)"
                )
            elif ranks[0].boot_id != self._refused_boot and self._may_try(ranks[0].boot_id):
                self._attach_or_detach(ranks)
        except ApolloError as error:
            # A checkpoint or optimizer file that cannot be read is waited for like a vLLM that is not there.
            self._wait_for_vllm(error.message, getattr(error, "refused", None))
        return self.live is not None

    def require_live(self) -> LiveModel:
        """Only while attached."""
        assert self.live is not None
        return self.live

    def let_go(self, reason: str) -> None:
        """Of every view of the weights, at once: the next vLLM needs the memory. Nothing is written to them
        any more; a sync that runs writes from copies, and `detach` waits for it."""
        self._board.state.attached = False
        self._board.state.attach_error = reason
        self._board.state.vllm_boot_id = self._board.state.vllm_pid = None
        live = self.live
        self.trainer = self.live = None
        if self.writer is not None:
            self.writer.let_go()
        if live is not None:
            live.close()

    def detach(self, reason: str) -> None:
        self.let_go(reason)
        writer, self.writer = self.writer, None
        if writer is not None:  # what was copied out is committed; its compaction can wait
            writer.wait(is_urgent=True, on_progress=lambda: self._board.show("syncing"))
        self._let_others_write()

    def _let_others_write(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()

    def _wait_for_vllm(self, reason: str, refused: list[str] | None = None) -> None:
        if reason != self._board.state.attach_error:
            log.info("not attached: %s", reason)
        self._board.state.attach_error = reason
        self._board.state.refused = refused or []

    def _may_try(self, boot_id: str) -> bool:
        """A vLLM at once, the same one again only after a while: an attempt may read the whole model."""
        now = time.monotonic()
        if self._tried is not None and self._tried[0] == boot_id and now - self._tried[1] < RETRY_S:
            return False
        self._tried = boot_id, now
        return True

    def _attach_or_detach(self, ranks: list[Manifest]) -> None:
        try:
            self._attach(ranks)
        except BaseException:
            if self.live is not None:  # mapped, but not brought to one state with the jobs: never trained so
                self.detach("attaching failed")
            self._let_others_write()
            raise

    def _attach(self, ranks: list[Manifest]) -> None:
        """Raises AttachError; one that will not go away without another vLLM is remembered by its boot_id."""
        config, board, manifest = self._config, self._board, ranks[0]
        show = partial(board.show, "attaching")
        show()
        before = read_state(config.state_dir)
        check_same_model(before, manifest.model_path, config.state_dir)
        model_dir = Path(manifest.model_path)
        is_new_boot = before is None or before.boot_id != manifest.boot_id
        self._hold = hold_model(model_dir, "the worker")
        # A vLLM that loads has worked the last delta in before; one written since stays beside the shards.
        recover(model_dir, is_folding=False, disk=WatchedDisk(show))
        try:
            # Weights that were trained since vLLM loaded them differ from the disk, and rightly so.
            live = attach(
                *ranks,
                verify=is_new_boot and config.worker.verify_checkpoint,
                on_progress=show,
            )
        except AttachError as error:
            if error.refused:
                self._refused_boot = manifest.boot_id
            raise
        self.live = live
        show()
        self.trainer = self._make_trainer(live)
        self.trainer.main_optimizer.warm_up()  # seconds, the first time ever: not in a job then
        show()
        self.writer = make_writer(live, config)
        self.writer.prepare(self.trainer.main_optimizer.state_size_bytes())
        self._tell_model(model_facts(live, self.trainer, config))
        commit = current_commit(model_dir)
        known = before.weight_version if before else 0
        board.state.weight_version = max(known, commit.weight_version if commit else 0)
        if self.recovery.at_attach(live, commit, is_new_boot=is_new_boot):
            commit = current_commit(model_dir)
        # Weights may be newer than these moments, whose own steps are what corrects their bias.
        load_optimizer(self.trainer, model_dir, commit, show)
        board.state.durable_version = commit.weight_version if commit else 0
        board.state.vllm_boot_id, board.state.vllm_pid = manifest.boot_id, manifest.pid
        board.state.model_path = manifest.model_path
        board.state.num_parameters = board.state.num_parameters_mapped = live.num_parameters
        board.state.optimizer_state_bytes = self.trainer.optimizer.state_size_bytes()
        board.state.attach_error, board.state.refused = None, []
        board.state.attached = True
        log.info(
            "attached to vLLM pid %d (boot %s): %d of %d parameters of %s, weight version %d",
            *(manifest.pid, manifest.boot_id[:8], live.num_parameters, live.num_parameters),
            *(manifest.model_path, board.state.weight_version),
        )

    def _make_trainer(self, live: LiveModel) -> Trainer:
        return Trainer(live, self._config.train)

    def write_back(self) -> None:
        """The last checkpoint's weights and moments, in place (Recovery.write_back)."""
        self.recovery.write_back(self.require_live())
        self._renew_trainer()

    def restore_version(self, weight_version: int) -> Commit:
        """Recovery.restore_version, with that version's moments."""
        commit = self.recovery.restore_version(self.require_live(), weight_version)
        self._renew_trainer()
        return commit

    def undo_torn_step(self) -> bool:
        """After an error inside a step (out of memory, a CUDA error): the same recovery as after a crash.
        Whether the weights were written back."""
        if self.live is None or not self.recovery.marks.is_torn or not self.recovery.mend(self.live):
            return False
        self._renew_trainer()
        return True

    def _renew_trainer(self) -> None:
        live = self.require_live()
        if self.trainer is not None:
            self.trainer.close()
        self.trainer = self._make_trainer(live)
        show = partial(self._board.show, "restoring")
        load_optimizer(self.trainer, live.model_dir, current_commit(live.model_dir), show)


def load_optimizer(
    trainer: Trainer,
    model_dir: Path,
    commit: Commit | None,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """The moments of the last commit; anew, with a warning, where those do not fit or are damaged."""
    try:
        if (
            commit is not None
            and (saved := read_optimizer(model_dir, commit.optimizer, on_progress)) is not None
        ):
            trainer.main_optimizer.load_state(*saved)
    except (UserError, CheckpointError) as error:
        log.warning("the saved optimizer state is not used, moments start anew: %s", error.message)


def make_writer(live: LiveModel, config: Config) -> CheckpointWriter:
    limit = config.checkpoint.max_write_bytes_per_s
    return CheckpointWriter(
        live.model_dir,
        live.trained_tensors(),
        disk=ThrottledDisk(limit) if limit else DISK,
        num_kept=config.checkpoint.history,
        max_abs_limit=config.checkpoint.max_abs_weight,
    )


def model_facts(live: LiveModel, trainer: Trainer, config: Config) -> ModelFacts:
    """Examples may be as long as both the configuration and the model's positions allow."""
    return ModelFacts(
        model_dir=str(live.model_dir),
        vocab_size=vocab_size_of(live.model),
        max_tokens=max_tokens_of(live.model, config.train.max_tokens),
        smaller_dims=trainer.smaller_dims(),
    )
