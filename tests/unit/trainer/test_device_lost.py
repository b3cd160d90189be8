"""Errors of the device: whose end they are, and who goes on. No device is needed: the errors are raised."""

from __future__ import annotations

import threading

import pytest
import torch
from apollo_worker.model.device import is_device_lost
from apollo_worker.trainer import loop
from trainer_by_hand import Trainer

ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
TRITON = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx")


def raise_in_step(trainer: Trainer, error: Exception) -> None:
    def step_on(*args, **kwargs):
        raise error

    trainer.worker.attachment.trainer.step_on = step_on


def a_context(monkeypatch, error: Exception | None) -> None:
    """A CUDA context, from which `error` comes back at every call."""

    def synchronize(*args):
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


@pytest.mark.parametrize("error", [TRITON, CUBLAS, ILLEGAL, ValueError("shapes")])
def test_a_context_in_error_is_lost_whoever_told_first(monkeypatch, error):
    a_context(monkeypatch, ILLEGAL)
    assert is_device_lost(error)


@pytest.mark.parametrize(
    "error", [TRITON, torch.OutOfMemoryError("CUDA out of memory"), ValueError("shapes")]
)
def test_a_context_that_answers_is_not_lost(monkeypatch, error):
    a_context(monkeypatch, None)
    assert not is_device_lost(error)


def test_without_a_context_only_torchs_own_error_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert is_device_lost(ILLEGAL)
    assert not is_device_lost(TRITON)


@pytest.mark.parametrize("error", [ILLEGAL, TRITON])
def test_an_error_of_the_device_before_vllms_death_shows_releases_the_job(served, config, monkeypatch, error):
    with Trainer(config) as trainer:
        job = trainer.submit("one")
        raise_in_step(trainer, error)
        monkeypatch.setattr(loop, "is_device_lost", lambda found: found is error)
        dying = threading.Timer(0.5, served.kill)  # killed, and its memory is still being torn down
        dying.start()
        trainer.worker.train(trainer.queue.take())
        dying.join()
        assert trainer.state(job) not in ("failed", "quarantined")
        assert trainer.board.stopping.is_set()


def test_a_device_that_is_lost_while_vllm_lives_ends_the_trainer(served, config, monkeypatch):
    monkeypatch.setattr(loop, "DEATH_SHOWS_WITHIN_S", 0.2)
    with Trainer(config) as trainer:
        job = trainer.submit("one")
        raise_in_step(trainer, ILLEGAL)
        with pytest.raises(torch.AcceleratorError):
            trainer.worker.train(trainer.queue.take())
        assert trainer.worker.marks.is_torn  # nothing of it is synced
        assert trainer.state(job) != "failed"
