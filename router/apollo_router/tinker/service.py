"""What the routes share: the store, the runner, and the samples that are being made."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import FastAPI

from apollo_ipc.errors import ApolloError, UserError
from apollo_router.errors import HttpError
from apollo_router.fine_tuning.delivery import patiently
from apollo_router.gateway import Gateway
from apollo_router.log import logger
from apollo_router.tinker.bodies import Sample
from apollo_router.tinker.runner import Runner, StaleSampler
from apollo_router.tinker.sampling import Vllm, scores
from apollo_router.tinker.store import TinkerStore, store_path

SAMPLE_KEPT_S = 600.0  # an answer that nobody fetches; the SDK asks every 45 s
Answer = tuple[str, bytes]  # "waiting", "protobuf" or "json", and its bytes


class Service:
    """Opened by the first request: nobody pays for what nobody uses."""

    store: TinkerStore
    runner: Runner
    vllm: Vllm

    def __init__(self, app: FastAPI):
        self.gateway: Gateway = app.state.apollo
        self._app = app
        self._opening = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None
        self._samples: dict[str, asyncio.Task[Answer]] = {}

    async def open(self) -> None:
        """Raises HttpError where this server cannot serve it."""
        async with self._opening:
            if self._running is not None:
                return
            served = self.gateway.vllm
            if served.num_api_servers > 1:
                raise HttpError(
                    501, "several_api_servers", "Tinker's API wants one API server: --api-server-count 1"
                )
            self.store = await asyncio.to_thread(TinkerStore, store_path(self.gateway.config))
            self.vllm = Vllm(
                self._app, self.gateway.model_names[0], served.max_model_len,
                has_processed_logprobs=served.logprobs_mode == "processed_logprobs",
            )  # fmt: skip
            self.runner = Runner(self.gateway, self.store, self.vllm)
            self._running = asyncio.create_task(self.runner.run())

    async def close(self) -> None:
        if self._running is None:
            return
        tasks = [self._running, *self._samples.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.runner.reference.close()
        await self.vllm.close()
        self.store.close()

    async def result_of(self, request_id: str, wait_s: float) -> Answer | None:
        """None: there is no such future."""
        if (sample := self._samples.get(request_id)) is not None:
            await asyncio.wait({sample}, timeout=wait_s)
            return sample.result() if sample.done() and not sample.cancelled() else ("waiting", b"")
        request = await self.runner.result_of(request_id, wait_s)
        if request is None or request.result is None:
            return None if request is None else ("waiting", b"")
        is_protobuf = request.kind.startswith("forward") and request.state == "done"
        return "protobuf" if is_protobuf else "json", request.result

    def sample(self, asked: Sample) -> str:
        """The future's id; the same number in the same session is the same one."""
        request_id = f"{asked.sampling_session_id}:{asked.seq_id}"
        if request_id not in self._samples:
            self._samples[request_id] = task = asyncio.create_task(self._sample(asked))
            loop = asyncio.get_running_loop()
            task.add_done_callback(
                lambda _: loop.call_later(SAMPLE_KEPT_S, self._samples.pop, request_id, None)
            )
        return request_id

    def cancel_sample(self, request_id: str) -> None:
        if (task := self._samples.get(request_id)) is not None:
            task.cancel()

    async def _sample(self, asked: Sample) -> Answer:
        """Asked before and after: a snapshot's answer is of its weights alone."""
        try:
            answer = await self._fresh_sample(asked)
        except ApolloError as error:
            category = "user" if isinstance(error, UserError) else "server"
            return "json", msgspec.json.encode({"error": error.message, "category": category})
        except Exception:
            logger.exception("sampling failed")
            return "json", msgspec.json.encode(
                {"error": "internal error; see vLLM's log", "category": "server"}
            )
        return "protobuf", answer

    async def _fresh_sample(self, asked: Sample) -> bytes:
        try:
            await self._require_fresh(asked)
            answer = await self.vllm.sample(asked)
            await self._require_fresh(asked)
        except StaleSampler as error:
            is_kept = error.weight_version == self.runner.reference.version
            if not (is_kept and asked.is_scoring):
                raise
            ids = asked.prompt.ids()
            answer = scores(asked, await self.runner.reference.logprobs(ids))
        return answer

    async def _require_fresh(self, asked: Sample) -> None:
        await patiently(lambda: self.runner.require_fresh(asked.sampling_session_id))

    def training_run(self, model_id: str, created_at: float, user_metadata: Any) -> dict[str, Any]:
        return {
            "training_run_id": model_id,
            "base_model": self.gateway.model_names[0],
            "model_owner": "apollo-ipc",
            "is_lora": False,
            "last_request_time": datetime.fromtimestamp(created_at, UTC).isoformat(),
            "user_metadata": user_metadata,
        }
