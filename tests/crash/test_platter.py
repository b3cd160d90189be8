"""The model of a power cut itself: what it takes for possible, and what not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from platter import SECTOR_BYTES, Platter, State, read_state
from simulated_disk import SimulatedDisk


def after(
    root: Path, run: Callable[[SimulatedDisk], object], limit: int = 500
) -> list[dict[str, bytes | None]]:
    """Every tree (path -> bytes, None for a directory) that a power cut after `run` may leave."""
    platter, disk = Platter(read_state(root)), SimulatedDisk(root)
    run(disk)
    for op in disk.log:
        platter.apply(op)
    states = {state.key(): state for state in platter.states(random.Random(0), limit)}
    return [contents(state) for state in states.values()]


def contents(state: State) -> dict[str, bytes | None]:
    return {path: file and file.data for path, file in state.tree.items()}


def write(disk: SimulatedDisk, path: Path, data: bytes, *, is_flushed: bool = True) -> None:
    file = disk.create(path)
    disk.write(file, data)
    if is_flushed:
        disk.sync(file)
    disk.close(file)


def test_bytes_that_are_not_flushed_may_be_lost_sector_by_sector(tmp_path):
    data = bytes(range(1, 4 * SECTOR_BYTES + 1))

    def run(disk: SimulatedDisk) -> None:
        write(disk, tmp_path / "a", data, is_flushed=False)
        disk.sync_dir(tmp_path)

    found = {tree["a"] for tree in after(tmp_path, run)}
    assert {b"", data, bytes(len(data)), data[: len(data) // 2]} <= found
    assert any(len(one) == len(data) and one not in (data, bytes(len(data))) for one in found)


def test_a_flushed_file_without_a_flushed_name_may_be_gone_and_never_be_torn(tmp_path):
    trees = after(tmp_path, lambda disk: write(disk, tmp_path / "a", b"1" * 100))
    assert sorted(trees, key=len) == [{}, {"a": b"1" * 100}]


def test_changes_of_a_directory_arrive_in_any_subset_until_it_is_flushed(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())

    def run(disk: SimulatedDisk) -> None:
        disk.unlink(tmp_path / "a")
        disk.sync_dir(tmp_path)
        disk.unlink(tmp_path / "b")
        disk.unlink(tmp_path / "c")

    assert sorted("".join(tree) for tree in after(tmp_path, run)) == ["", "b", "bc", "c"]


def test_a_rename_replaces_its_target_at_once(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").write_bytes(b"new")
    trees = after(tmp_path, lambda disk: disk.rename(tmp_path / "b", tmp_path / "a"))
    assert sorted(trees, key=len) == [{"a": b"new"}, {"a": b"old", "b": b"new"}]


def test_a_rename_between_directories_may_leave_both_names_and_never_none(tmp_path):
    for name in "xy":
        (tmp_path / name).mkdir()
    (tmp_path / "x" / "f").write_bytes(b"data")

    def rename(disk: SimulatedDisk) -> None:
        disk.rename(tmp_path / "x" / "f", tmp_path / "y" / "f")

    def rename_and_flush_the_source(disk: SimulatedDisk) -> None:
        disk.rename(tmp_path / "y" / "f", tmp_path / "x" / "g")
        disk.sync_dir(tmp_path / "y")

    names = [sorted(path for path, data in tree.items() if data) for tree in after(tmp_path, rename)]
    assert sorted(names) == [["x/f"], ["x/f", "y/f"], ["y/f"]]
    assert [
        sorted(path for path, data in tree.items() if data)
        for tree in after(tmp_path, rename_and_flush_the_source)
    ] == [["x/g"]]


def test_what_is_in_a_directory_goes_with_its_name(tmp_path):
    def run(disk: SimulatedDisk) -> None:
        disk.mkdir(tmp_path / "x")
        write(disk, tmp_path / "x" / "f", b"data")
        disk.sync_dir(tmp_path / "x")

    assert sorted(after(tmp_path, run), key=len) == [{}, {"x": None, "x/f": b"data"}]


def test_two_names_of_a_file_stay_one_file(tmp_path):
    (tmp_path / "a").write_bytes(b"data")

    def run(disk: SimulatedDisk) -> None:
        disk.link(tmp_path / "a", tmp_path / "b")
        disk.sync_dir(tmp_path)

    platter, disk = Platter(read_state(tmp_path)), SimulatedDisk(tmp_path)
    run(disk)
    for op in disk.log:
        platter.apply(op)
    (state,) = {state.key(): state for state in platter.states(random.Random(0), 10)}.values()
    state.materialise(tmp_path / "again")
    assert (tmp_path / "again" / "a").samefile(tmp_path / "again" / "b")
