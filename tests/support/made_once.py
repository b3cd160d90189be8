"""Directories that take long to make and are only read: kept over runs, by the digest of what makes them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
KEPT_S = 30 * 86400  # without use


class MadeOnce:
    def __init__(self, root: Path):
        self.root = root

    def path(self, name: str, sources: Iterable[Path], *arguments: object) -> Path:
        """Where the directory stands that `sources` make of `arguments`, once it is made."""
        digest = hashlib.sha256(repr((arguments, [_version(library) for library in LIBRARIES])).encode())
        for source in sources:
            digest.update(source.read_bytes())
        return self.root / f"{name}-{digest.hexdigest()[:16]}"

    def directory(
        self, make: Callable[[Path], object], name: str, sources: Iterable[Path], *arguments: object
    ) -> Path:
        """`make(directory)` is called unless that has been done; of two processes the second waits for the
        first, and one that is killed leaves nothing that passes for a whole directory."""
        path = self.path(name, sources, *arguments)
        with (self.root / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._forget_old()
                with tempfile.TemporaryDirectory(dir=self.root, prefix="unfinished-") as unfinished:
                    make(Path(unfinished) / "made")
                    os.replace(Path(unfinished) / "made", path)
            os.utime(path)
        return path

    def _forget_old(self) -> None:
        for entry in self.root.iterdir():
            if entry.is_dir() and time.time() - entry.stat().st_mtime > KEPT_S:
                shutil.rmtree(entry, ignore_errors=True)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
