"""JSONL of stripped conversations: each line is an example that `apollo-ipc train` takes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from apollo_curation.logs.conversation import Conversation
from apollo_ipc.errors import UserError


class StrippedFile:
    """`with StrippedFile(path, sources) as file: file.add(...)`; without a path it only counts.

    The file appears under its name when all is written, in place of an older one; nothing is left of it after
    an error. Raises UserError where it cannot be written, or is one of the files that are read.
    """

    def __init__(self, path: Path | None, sources: Iterable[Path]):
        self.num_written = 0
        self._path = path
        self._file: BinaryIO | None = None
        if path is None:
            return
        if path.exists() and any(path.samefile(source) for source in sources):
            raise UserError(f"{path} is one of the files that are read; choose another name", field="--out")
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self._file = self._part.open("xb")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", field="--out") from None

    def add(self, conversation: Conversation) -> None:
        """One without any answer is left out: there is nothing to learn in it."""
        if self._file is None or all(message.role != "assistant" for message in conversation.messages):
            return
        line: dict[str, Any] = {"messages": conversation.messages}
        if conversation.tools:
            line["tools"] = conversation.tools
        self._file.write(msgspec.json.encode(line) + b"\n")
        self.num_written += 1

    def __enter__(self) -> StrippedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None or self._path is None:
            return
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink()
