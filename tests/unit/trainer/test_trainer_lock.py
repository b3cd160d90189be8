"""One trainer a queue, wherever its socket is."""

from __future__ import annotations

import os
import shutil
import threading

from apollo_worker.link.status_board import StatusBoard
from apollo_worker.trainer.front_end import trainer_lock


def test_a_trainer_whose_runtime_directory_is_gone_keeps_the_next_one_from_its_queue(config):
    with trainer_lock(StatusBoard(), config) as is_first:
        assert is_first
        shutil.rmtree(config.runtime_dir)  # a logout
        config.runtime_dir.mkdir(mode=0o700)
        board = StatusBoard()
        stopping = threading.Timer(0.5, lambda: (board.stopping.set(), board.wake.set()))
        stopping.start()
        with trainer_lock(board, config) as is_second:
            assert not is_second
        assert f"waiting for the trainer (pid {os.getpid()}, since 2" in str(board.state.attach_error)
    with trainer_lock(StatusBoard(), config) as is_third:
        assert is_third
