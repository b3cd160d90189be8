"""What may be on a disk after a power cut: the model behind these tests (see test_power_cuts.py).

A Platter replays operations and keeps, for each file, its bytes as of the last flush and as of now, and for
the directories each change of an entry with whether it is flushed. `Platter.states` builds crash states.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from simulated_disk import Operation

SECTOR_BYTES = 32  # as small as these files: what is lost or kept of a write as a whole


class File:
    """A regular file. `flushed`: its bytes as of the last sync; `cached`: as a process sees it."""

    def __init__(self, data: bytes, mtime_ns: int, mode: int, *, is_flushed: bool):
        self.cached = data
        self.flushed = data if is_flushed else b""
        self.mtime_ns = mtime_ns
        self.mode = mode


class Directory:
    """Only an identity: its entries are what the changes of the platter make of them."""


Node = File | Directory
Entries = dict[tuple[Directory, str], Node]


class Change:
    """Entries of one directory that change together: None removes. It never arrives without `needs`."""

    def __init__(self, directory: Directory, entries: dict[str, Node | None], needs: Change | None = None):
        self.directory, self.entries, self.needs = directory, entries, needs
        self.is_flushed = False

    def flush(self) -> None:
        self.is_flushed = True
        if self.needs is not None:
            self.needs.flush()


class StoredFile(NamedTuple):
    data: bytes
    mtime_ns: int
    mode: int
    identity: int  # names with the same one are the same file


class State:
    """One thing that may be on the platter: path -> StoredFile, or None for a directory."""

    def __init__(self, tree: dict[str, StoredFile | None]):
        self.tree = tree

    def key(self) -> bytes:
        """The same for states that nothing can tell apart."""
        firsts: dict[int, str] = {}
        text = hashlib.blake2b(digest_size=16)
        for path, file in sorted(self.tree.items()):
            if file is not None:
                text.update(repr((path, file[:3], firsts.setdefault(file.identity, path))).encode())
            else:
                text.update(repr(path).encode())
        return text.digest()

    def materialise(self, root: Path) -> None:
        firsts: dict[int, str] = {}
        os.mkdir(root)
        for path, file in sorted(self.tree.items()):
            full = f"{root}/{path}"
            if file is None:
                os.mkdir(full)
            elif file.identity in firsts:
                os.link(firsts[file.identity], full)
            else:
                firsts[file.identity] = full
                fd = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
                os.write(fd, file.data)
                os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
                os.close(fd)


def read_state(root: Path) -> State:
    """A directory as it is, to be taken as flushed."""
    tree: dict[str, StoredFile | None] = {}
    todo = [("", str(root))]
    while todo:
        prefix, folder = todo.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    tree[prefix + entry.name] = None
                    todo.append((f"{prefix}{entry.name}/", entry.path))
                    continue
                info = entry.stat()
                with open(entry.path, "rb", buffering=0) as file:
                    data = file.read()
                stored = StoredFile(data, info.st_mtime_ns, info.st_mode & 0o777, info.st_ino)
                tree[prefix + entry.name] = stored
    return State(tree)


class Platter:
    def __init__(self, initial: State, unflushed: Collection[str] = ()):
        """unflushed: files of which neither bytes nor name are on the disk yet."""
        self._root = Directory()
        self._live: Entries = {}  # as a process sees it
        files: dict[int, File] = {}
        for path, stored in sorted(initial.tree.items()):
            folder, name = self._find_folder(path)
            if stored is None:
                self._live[folder, name] = Directory()
            else:
                file = File(stored.data, stored.mtime_ns, stored.mode, is_flushed=path not in unflushed)
                self._live[folder, name] = files.setdefault(stored.identity, file)
        self._initial = dict(self._live)
        self._changes: list[Change] = []
        for path in unflushed:
            folder, name = self._find_folder(path)
            self._change(folder, {name: self._initial.pop((folder, name))})
        self.allowed: frozenset = frozenset()
        self.is_finished = False

    def apply(self, op: Operation) -> None:
        getattr(self, f"_{op.kind}")(op)

    def _mark(self, op: Operation) -> None:
        self.allowed, self.is_finished = op.allowed, op.is_finished

    def _create(self, op: Operation) -> None:
        folder, name = self._find_folder(op.path)
        file = self._live.get((folder, name))
        if file is None:
            self._change(folder, {name: File(b"", op.mtime_ns, op.mode, is_flushed=False)})
        else:
            file.cached, file.mtime_ns, file.mode = b"", op.mtime_ns, op.mode

    def _write(self, op: Operation) -> None:
        file = self._find(op.path)
        file.cached += op.data
        file.mtime_ns = op.mtime_ns

    def _sync(self, op: Operation) -> None:
        file = self._find(op.path)
        file.flushed = file.cached

    def _sync_dir(self, op: Operation) -> None:
        folder = self._find(op.path)
        for change in self._changes:
            if change.directory is folder:
                change.flush()

    def _rename(self, op: Operation) -> None:
        source_folder, source = self._find_folder(op.other)
        folder, name = self._find_folder(op.path)
        node = self._live[source_folder, source]
        if folder is source_folder:
            self._change(folder, {source: None, name: node})
        else:
            self._change(source_folder, {source: None}, needs=self._change(folder, {name: node}))

    def _link(self, op: Operation) -> None:
        folder, name = self._find_folder(op.path)
        self._change(folder, {name: self._find(op.other)})

    def _unlink(self, op: Operation) -> None:
        folder, name = self._find_folder(op.path)
        self._change(folder, {name: None})

    _rmdir = _unlink

    def _mkdir(self, op: Operation) -> None:
        folder, name = self._find_folder(op.path)
        self._change(folder, {name: Directory()})

    def _change(
        self, folder: Directory, entries: dict[str, Node | None], needs: Change | None = None
    ) -> Change:
        self._changes.append(Change(folder, entries, needs))
        _make(self._live, self._changes[-1])
        return self._changes[-1]

    def _find_folder(self, path: str) -> tuple[Directory, str]:
        folder, _, name = path.rpartition("/")
        return self._find(folder), name

    def _find(self, path: str) -> Node:
        node: Node = self._root
        for name in filter(None, path.split("/")):
            node = self._live[node, name]
        return node

    def states(self, rng: random.Random, limit: int) -> Iterator[State]:
        """What may be on the platter if the power fails now, the extremes first: all of it where that is no
        more than `limit` states, else so many, drawn at random. May repeat itself."""
        trees = list(itertools.islice(self._trees(rng, limit), limit))
        whole = [list(_contents(_dirty(tree), rng)) for tree in trees]
        is_small = sum(len(contents) for contents in whole) <= limit
        for tree, contents in zip(trees, whole, strict=True):
            # The first two of each: nothing of what was not flushed has arrived, all of it has.
            for content in contents if is_small else contents[:2]:
                yield _state(tree, content)
        for _ in range(0 if is_small else limit - 2 * len(trees)):
            n = rng.randrange(len(trees))
            yield _state(trees[n], rng.choice(whole[n]))

    def _trees(self, rng: random.Random, limit: int) -> Iterator[dict[str, Node]]:
        """Each subset of the changes that are not flushed; `limit` // 3 of them if there are more."""
        free = [change for change in self._changes if not change.is_flushed]
        if 2 ** len(free) <= max(limit // 3, 2):
            chosen: Iterable[set[Change]] = (
                {change for change, is_in in zip(free, bits, strict=True) if is_in}
                for bits in itertools.product((False, True), repeat=len(free))
            )
        else:
            few = [set(), set(free), *({change} for change in free), *({*free} - {change} for change in free)]
            rest = max(limit // 3 - len(few), 0)
            chosen = itertools.chain(few, ({c for c in free if rng.random() < 0.5} for _ in range(rest)))
        for some in chosen:
            if all(c.needs is None or c.needs.is_flushed or c.needs in some for c in some):
                yield self._tree(some)

    def _tree(self, chosen: set[Change]) -> dict[str, Node]:
        entries = dict(self._initial)
        for change in self._changes:
            if change.is_flushed or change in chosen:
                _make(entries, change)
        by_folder: dict[Directory, list[tuple[str, Node]]] = {}
        for (folder, name), node in entries.items():
            by_folder.setdefault(folder, []).append((name, node))
        tree: dict[str, Node] = {}
        todo = [("", self._root)]
        while todo:
            prefix, folder = todo.pop()
            for name, node in by_folder.get(folder, ()):
                tree[prefix + name] = node
                if isinstance(node, Directory):
                    todo.append((f"{prefix}{name}/", node))
        return tree


def _make(entries: Entries, change: Change) -> None:
    for name, node in change.entries.items():
        if node is None:
            entries.pop((change.directory, name), None)
        else:
            entries[change.directory, name] = node


def _dirty(tree: dict[str, Node]) -> list[File]:
    """Files with bytes that are not flushed, each once."""
    files = dict.fromkeys(node for node in tree.values() if isinstance(node, File))
    return [file for file in files if file.cached != file.flushed]


def _contents(dirty: list[File], rng: random.Random) -> Iterator[dict[File, bytes]]:
    """What may be in the files of `dirty`: first nothing new in any, then everything in all, then more."""
    if not dirty:
        yield {}
        return
    variants = {file: _variants(file, rng) for file in dirty}
    yield {file: some[0] for file, some in variants.items()}
    yield {file: some[1] for file, some in variants.items()}
    for file in dirty:
        for variant in variants[file]:
            yield {other: variants[other][1] for other in dirty} | {file: variant}
    for _ in range(4):
        yield {file: rng.choice(some) for file, some in variants.items()}


def _variants(file: File, rng: random.Random) -> list[bytes]:
    """Old, new, new length without new bytes, cut at a sector, and sectors of each kind at random."""
    old, new = file.flushed, file.cached
    shorter, longer = sorted((len(old), len(new)))
    found = [old, new, _mixed(old, new, longer, lambda: "zeros"), new[: len(new) // 2]]
    for kinds in (("old", "new"), ("new", "zeros"), ("old", "new", "zeros", "garbage")):
        found.append(_mixed(old, new, rng.randint(shorter, longer), lambda kinds=kinds: rng.choice(kinds)))
    lost = rng.randrange(0, max(longer, 1), SECTOR_BYTES)
    found.append(new[:lost] + bytes(len(new[lost : lost + SECTOR_BYTES])) + new[lost + SECTOR_BYTES :])
    return found


def _mixed(old: bytes, new: bytes, length: int, choose) -> bytes:
    """A file of `length` bytes; each sector that differs is "old", "new", "zeros" or "garbage"."""
    sectors = []
    for start in range(0, length, SECTOR_BYTES):
        end = min(start + SECTOR_BYTES, length)
        a, b = (data[start:end].ljust(end - start, b"\0") for data in (old, new))
        kind = "new" if a == b else choose()
        sectors.append(
            {"old": a, "new": b, "zeros": bytes(end - start), "garbage": b"\xa5" * (end - start)}[kind]
        )
    return b"".join(sectors)


def _state(tree: dict[str, Node], contents: dict[File, bytes]) -> State:
    return State(
        {
            path: None
            if isinstance(node, Directory)
            else StoredFile(contents.get(node, node.flushed), node.mtime_ns, node.mode, id(node))
            for path, node in tree.items()
        }
    )
