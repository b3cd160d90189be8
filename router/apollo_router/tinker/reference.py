"""The weights with which a run began, for what it is measured against (DPO, a divergence): log-probabilities
alone, by a process of its own that reads them from the disk. The one live copy has gone on meanwhile."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from apollo_ipc.checkpoint.snapshot import Snapshot, snapshot
from apollo_ipc.errors import ApolloError
from apollo_ipc.manifest import read_manifest
from apollo_ipc.process.serving import die_with_parent
from apollo_router.log import logger

IDLE_S = 600.0  # after which the process ends, and its memory with it
MAX_LINE_BYTES = 16 * 1024 * 1024


class Reference:
    """version: of the weights that are kept, None while none are. They are hard links in the model directory:
    no bytes, until a sync replaces the shards. Belongs to one event loop."""

    def __init__(self, runtime_dir: Path):
        self.version: int | None = None
        self._runtime_dir = runtime_dir
        self._kept: Snapshot | None = None
        self._held = ExitStack()
        self._child: Process | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._turn = asyncio.Lock()

    async def keep(self, version: int) -> None:
        """In place of those that were kept. Whole shards of this version must be on the disk. Where it cannot
        be had, there is no reference, and the log says why."""
        async with self._turn:
            await self._let_go()
            try:
                kept = await asyncio.to_thread(self._link)
            except (ApolloError, OSError) as error:
                logger.warning("the weights that a run is measured against are not kept: %s", error)
                return
            if kept.commit is not None and kept.commit.weight_version == version:
                self._kept, self.version = kept, version
            else:  # something was trained meanwhile
                await self._let_go()

    def _link(self) -> Snapshot:
        manifest = read_manifest(self._runtime_dir)
        if manifest is None:
            raise ApolloError("vLLM has not shared its weights")
        return self._held.enter_context(snapshot(Path(manifest.model_path)))

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Of each token but the first. One sequence at a time. Raises ApolloError."""
        async with self._turn:
            if self._child is None or self._child.returncode is not None:
                self._child = await self._start()
            child = self._child
            assert child.stdin is not None
            assert child.stdout is not None
            if self._idle is not None:
                self._idle.cancel()
            child.stdin.write(json.dumps(list(tokens)).encode() + b"\n")
            with suppress(ConnectionError):
                await child.stdin.drain()
            line = await child.stdout.readline()
            if not line:
                code = await child.wait()
                raise ApolloError(
                    f"the process that reads version {self.version} from disk ended with {code}"
                )
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, child.stdin.close)
            return json.loads(line)

    async def _start(self) -> Process:
        if self._kept is None:
            raise ApolloError("no weights are kept to be measured against")
        logger.info("reading weights %s from disk, to measure against them", self.version)
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "apollo_worker.commands.logprobs", str(self._kept.path)),
            stdin=PIPE,
            stdout=PIPE,
            limit=MAX_LINE_BYTES,
            pass_fds=[self._kept.held_by],
            preexec_fn=die_with_parent,
        )

    async def close(self) -> None:
        async with self._turn:
            await self._let_go()

    async def _let_go(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()
        self._child, self._kept, self.version = None, None, None
        await asyncio.to_thread(self._held.close)
