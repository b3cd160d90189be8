"""What is made once for all runs of the tests, and by two of them at once."""

from __future__ import annotations

import threading

import pytest
from made_once import MadeOnce


def test_a_directory_is_made_once_and_anew_when_what_makes_it_changes(tmp_path):
    source, made = tmp_path / "source.py", []
    source.write_text("1")
    (tmp_path / "root").mkdir()
    once = MadeOnce(tmp_path / "root")

    def make(directory):
        directory.mkdir()
        (directory / "number").write_text(str(len(made)))
        made.append(directory)

    def number(*arguments):
        return (once.directory(make, "model", [source], *arguments) / "number").read_text()

    assert [number(), number(), number("other"), number()] == ["0", "0", "1", "0"]
    source.write_text("2")
    assert number() == "2"


def test_what_fails_in_the_middle_is_made_again_and_two_at_once_make_one(tmp_path):
    once, begun, makers = MadeOnce(tmp_path), threading.Event(), []

    def fail(directory):
        directory.mkdir()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        once.directory(fail, "model", [])

    def make(directory):
        makers.append(directory)
        begun.wait(10)
        directory.mkdir()
        (directory / "file").write_text("whole")

    found = []
    threads = [threading.Thread(target=lambda: found.append(once.directory(make, "model", []))) for _ in "ab"]
    for thread in threads:
        thread.start()
    begun.set()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    assert [(path / "file").read_text() for path in found] == ["whole", "whole"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("unfinished")] == []
