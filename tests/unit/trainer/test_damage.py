"""Files of the state directory whose bytes are others: what they say is not believed."""

from __future__ import annotations

import pytest
from apollo_worker.jobs.job_plan import decode_plan, encode_plan
from apollo_worker.trainer.step_marks import LastStep, StepMarks, read_state
from trainer_by_hand import Killed, Trainer, assert_same, kill_in_backward

from apollo_ipc.errors import AttachError

OF_A_STEP = 96  # bytes


@pytest.fixture
def cut_off(served, config):
    """(the weights of the last checkpoint, two jobs after it): the second was cut off in its first step."""
    with Trainer(config) as trainer:
        trainer.submit("one")
        trainer.train()
        trainer.sync()
        committed = trainer.live()
        jobs = [trainer.submit("two"), trainer.submit("three")]
        trainer.worker.train(trainer.queue.take())
        kill_in_backward(trainer, 1)
        with pytest.raises(Killed):
            trainer.worker.train(trainer.queue.take())
    return committed, jobs


def flip_a_bit(marks: bytes) -> bytes:
    return marks[:60] + bytes([marks[60] ^ 1]) + marks[61:]


def of_no_known_boot(marks: bytes) -> bytes:
    return b"\0" * 8 + marks[8:]


@pytest.mark.parametrize(
    "damage", [flip_a_bit, of_no_known_boot, lambda marks: b"", lambda marks: b"\xff" * 4096]
)
def test_damaged_marks_are_those_of_a_torn_step(config, cut_off, damage):
    committed, jobs = cut_off
    path = config.state_dir / "step.marks"
    path.write_bytes(damage(path.read_bytes()))
    with Trainer(config) as trainer:
        assert_same(committed, trainer.live())
        assert trainer.train() == jobs
        assert trainer.steps() == {3}
        trainer.sync()
        assert [trainer.state(job) for job in jobs] == ["durable", "durable"]


def test_no_flipped_bit_of_the_marks_says_something_else(tmp_path):
    path = tmp_path / "step.marks"
    marks = StepMarks(path)
    marks.end("a" * 32, "job-0123", 4, 2.5)
    said, whole = marks.read(), path.read_bytes()
    assert said == LastStep("a" * 32, "0123", 4, 4, 2.5, 1)
    marks.close()
    for at in range(OF_A_STEP * 8):
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        again = StepMarks(path)
        assert again.is_torn, at
        again.close()


def test_the_marks_of_an_older_program_are_read(tmp_path):
    path = tmp_path / "step.marks"
    marks = StepMarks(path)
    marks.end("a" * 32, "job-0123", 4, 2.5)
    said, whole = marks.read(), path.read_bytes()
    marks.close()
    path.write_bytes(whole[: OF_A_STEP - 8] + bytes(4096 - OF_A_STEP + 8))  # which ended with the numbers
    assert StepMarks(path).read() == said


def test_a_state_file_with_a_flipped_bit_is_refused_in_words(config, cut_off):
    path = config.state_dir / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"weight_version":', b'"weight_version":1'))
    with pytest.raises(AttachError, match="damaged"):
        read_state(config.state_dir)


def test_no_flipped_bit_of_a_stored_plan_is_another_plan(config, cut_off):
    with Trainer(config) as trainer:
        stored = encode_plan(trainer.queue.take().plan)
    plan = decode_plan(stored)
    assert plan is not None
    for at in range(len(stored) * 8):
        changed = bytearray(stored)
        changed[at // 8] ^= 1 << at % 8
        assert decode_plan(bytes(changed)) is None, at
    assert decode_plan(stored[:-17]) == plan, "an older program's, without the digest"
    # Of one plan in some hundreds the digest reads as a value: a bit in the length of the last field's name.
    name, value = stored.rindex(b"\xa4adam"), b"\xaf" + bytes(15)
    assert decode_plan(stored[:name] + b"\xa6" + stored[name + 1 : -16] + value) is None
