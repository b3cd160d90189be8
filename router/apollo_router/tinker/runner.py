"""Does what training clients asked for, in the order in which they asked: one request after the other.

What steps is a job in the worker's queue, under the request's id as idempotency key: whatever dies on the
way, it is trained once, and its future is answered in the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec

from apollo_ipc.errors import ApolloError, NotReady, UserError
from apollo_ipc.wire.messages import GetStatus, PinVersion, RestoreVersion, Submit, SyncCheckpoint
from apollo_ipc.wire.replies import JobInfo
from apollo_router.gateway import Gateway
from apollo_router.log import logger
from apollo_router.tinker.batch import LossBatch, answer, read_batch, train_body
from apollo_router.tinker.bodies import (
    CreateModel,
    CreateSamplingSession,
    LoadWeights,
    OptimStep,
    SaveForSampler,
    SaveWeights,
    read_json,
    read_path,
)
from apollo_router.tinker.reference import Reference
from apollo_router.tinker.sampling import Vllm
from apollo_router.tinker.store import QueuedCall, State, TinkerStore

AGAIN_S = 1.0
SYNC_TIMEOUT_S = 3600.0
FULL_WEIGHTS = (
    "this server trains the full weights of the one model that it serves; it has no LoRA: ask for rank 0. "
    "Recipes multiply learning rates for LoRA by about ten"
)


class StaleSampler(UserError):
    """weight_version: of the snapshot."""

    code = "stale_sampler"

    def __init__(self, message: str, weight_version: int):
        super().__init__(message)
        self.weight_version = weight_version


class JobFailed(ApolloError):
    """The step that an optim_step asked for is not in the weights."""


class Runner:
    """Belongs to one event loop, and is the only one that has the store open.

    reference: the weights that the last model began with. away: why nothing is done right now, None where
    something is.
    """

    def __init__(self, gateway: Gateway, store: TinkerStore, vllm: Vllm):
        self._gateway, self._store, self._vllm = gateway, store, vllm
        self.reference = Reference(gateway.config.runtime_dir)
        self._news, self._settled = asyncio.Event(), asyncio.Condition()
        self.away: str | None = None

    def wake(self) -> None:
        """Something was asked for."""
        self._news.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            self._news.clear()
            try:
                request = await asyncio.to_thread(self._store.next_waiting)
                if request is None:
                    await self._news.wait()
                else:
                    await self._do(request)
            except NotReady as error:  # the worker will be back; what was asked for stays
                self.away = error.message
                await asyncio.sleep(AGAIN_S)
            except Exception:
                logger.exception("a request of Tinker's API could not be done; trying again")
                await asyncio.sleep(AGAIN_S)
            else:
                self.away = None

    async def result_of(self, request_id: str, wait_s: float) -> QueuedCall | None:
        """The request, when it is settled or after `wait_s`; None: there is none."""
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    async with self._settled:
                        request = await asyncio.to_thread(self._store.asked, request_id)
                        if request is None or request.state != "waiting":
                            return request
                        await self._settled.wait()
        except TimeoutError:
            return await asyncio.to_thread(self._store.asked, request_id)

    async def _do(self, request: QueuedCall) -> None:
        ways: dict[str, Callable[[QueuedCall], Any]] = {
            "create_model": self._create_model,
            "forward": self._forward,
            "forward_backward": self._forward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_for_sampler,
            "load_weights": self._load_weights,
        }
        state: State = "done"
        try:
            result = await ways[request.kind](request)
        except NotReady:
            raise
        except ApolloError as error:
            at = f" ({error.field})" if error.field else ""
            category = "user" if isinstance(error, UserError) else "server"
            state, result = "failed", {"error": f"{error.message}{at}", "category": category}
        except Exception as error:
            logger.exception("%s %s failed", request.kind, request.id)
            told = f"internal error ({type(error).__name__}); see vLLM's log"
            state, result = "failed", {"error": told, "category": "server"}
        body = result if isinstance(result, bytes) else msgspec.json.encode(result)
        is_closing = request.kind in ("optim_step", "load_weights")
        await asyncio.to_thread(self._store.settle, request, state, body, is_closing=is_closing)
        async with self._settled:
            self._settled.notify_all()

    # --- what each request does ---

    async def _create_model(self, request: QueuedCall) -> dict[str, Any]:
        body = read_json(request.body, CreateModel)
        self.require_model(body.base_model)
        if body.lora_config is not None:
            if body.lora_config.rank != 0:
                raise UserError(FULL_WEIGHTS, field="lora_config.rank")
            parts = body.lora_config
            if not (parts.train_unembed and parts.train_mlp and parts.train_attn):
                raise UserError("all weights are trained here, no parts of them", field="lora_config")
        _require_adam(body.optimizer_config)
        model_id = f"{body.session_id}:train:{body.model_seq_id}"
        await asyncio.to_thread(self._store.take_lease, model_id, body.session_id, body.user_metadata)
        return {"type": "create_model", "model_id": model_id}

    async def _forward(self, request: QueuedCall) -> bytes:
        await asyncio.to_thread(self._store.require_owner, request.scope)
        batch = await asyncio.to_thread(read_batch, request.body)
        logprobs = await self._vllm.logprobs(batch.data)
        return await asyncio.to_thread(answer, batch, logprobs)

    async def _optim_step(self, request: QueuedCall) -> dict[str, Any]:
        await asyncio.to_thread(self._store.require_owner, request.scope)
        asked = read_json(request.body, OptimStep)
        before: list[QueuedCall] = await asyncio.to_thread(self._store.open_before, request)
        if failed := next((one for one in before if one.state == "failed"), None):
            why = msgspec.json.decode(failed.result or b"{}").get("error")
            raise UserError(f"nothing was trained, since a forward_backward before it failed: {why}")
        if not before:
            raise UserError("an optim_step steps on the forward_backwards before it, and there is none")
        batches: list[LossBatch] = [await asyncio.to_thread(read_batch, one.body) for one in before]
        body = await asyncio.to_thread(train_body, batches, asked.adam_params)
        job = await self._train(body, request.id)
        metrics = {"weight_version": float(job.weight_version or 0), "loss:sum": job.loss_last}
        return {"metrics": {name: value for name, value in metrics.items() if value is not None}}

    async def _save_weights(self, request: QueuedCall) -> dict[str, Any]:
        """A sync, pinned: the last save stays restorable however many syncs follow."""
        await asyncio.to_thread(self._store.require_owner, request.scope)
        body = read_json(request.body, SaveWeights)
        client, path = self._gateway.client, _saved_as(body, "weights")
        if not body.overwrite and await asyncio.to_thread(self._is_saved, path):
            raise UserError(
                f"{path} is there already; save under another name, or overwrite it", field="path"
            )
        synced = (await client.request(SyncCheckpoint(""), timeout_s=SYNC_TIMEOUT_S)).sync
        assert synced is not None
        await client.request(PinVersion("", synced.weight_version), timeout_s=SYNC_TIMEOUT_S)
        await asyncio.to_thread(self._store.save, path, synced.weight_version)
        return {"type": "save_weights", "path": path}

    async def _save_for_sampler(self, request: QueuedCall) -> dict[str, Any]:
        """The weights are served already: what is kept is which version they are. Those that a run begins
        with are kept themselves, since runs are measured against them."""
        await asyncio.to_thread(self._store.require_owner, request.scope)
        body, version = read_json(request.body, SaveForSampler), await self.weight_version()
        if body.path is not None:
            path = _saved_as(body, "sampler_weights")
            await asyncio.to_thread(self._store.save, path, version)
            return {"type": "save_weights_for_sampler", "path": path}
        sampler_id = f"{request.scope}:sample:{body.sampling_session_seq_id}"
        if body.kind == "snapshot" and not await asyncio.to_thread(self._store.has_stepped, request.scope):
            await self._keep_reference(version)
        await asyncio.to_thread(self._store.add_sampler, sampler_id, body.kind, version)
        return {"type": "save_weights_for_sampler", "sampling_session_id": sampler_id}

    async def _keep_reference(self, version: int) -> None:
        if self.reference.version != version:
            # Whole shards: what reads them knows no differences.
            await self._gateway.client.request(SyncCheckpoint(""), timeout_s=SYNC_TIMEOUT_S)
            await self.reference.keep(version)

    async def _load_weights(self, request: QueuedCall) -> dict[str, Any]:
        body = read_json(request.body, LoadWeights)
        if not body.optimizer:
            raise UserError(
                "weights are loaded with their optimizer's state: load_state_with_optimizer, or "
                "create_training_client_from_state_with_optimizer",
                field="optimizer",
            )
        _require_adam(body.optimizer_config)
        if body.base_model is not None:
            self.require_model(body.base_model)
        model_id = body.model_id or f"{body.session_id}:train:{body.model_seq_id}"
        if body.model_id is None:
            session_id = body.session_id or ""
            await asyncio.to_thread(self._store.take_lease, model_id, session_id, body.user_metadata)
        await asyncio.to_thread(self._store.require_owner, model_id)
        if read_path(body.path).kind != "weights":
            raise UserError("what was saved for a sampler has no optimizer: use save_state", field="path")
        version: int = await asyncio.to_thread(self._store.saved_version, body.path)
        if version != await self.weight_version():
            # Asked again where the worker dies meanwhile: the same weights once more.
            asked = RestoreVersion("", version)
            await self._gateway.client.request(asked, timeout_s=SYNC_TIMEOUT_S)
        return {"type": "load_weights", "path": body.path, "model_id": model_id}

    async def create_sampler(self, body: CreateSamplingSession) -> str:
        """Raises UserError where what it shall sample is not what is served."""
        if body.base_model is not None:
            self.require_model(body.base_model)
        version = await self.weight_version()
        if body.model_path is not None:
            saved: int = await asyncio.to_thread(self._store.saved_version, body.model_path)
            _require_fresh(body.model_path, saved, version)
        sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
        await asyncio.to_thread(self._store.add_sampler, sampler_id, "snapshot", version)
        return sampler_id

    async def require_fresh(self, sampler_id: str) -> None:
        """Raises StaleSampler where a snapshot's weights are served no more."""
        sampler = await asyncio.to_thread(self._store.sampler, sampler_id)
        if sampler.kind == "snapshot":
            _require_fresh("this sampler", sampler.weight_version, await self.weight_version())

    # --- the worker ---

    def require_model(self, name: str) -> None:
        if name not in (names := self._gateway.model_names):
            raise UserError(
                f"this server has one model, {' or '.join(names)}, not {name!r}", field="base_model"
            )

    async def weight_version(self) -> int:
        """Raises NotReady."""
        status = (await self._gateway.client.request(GetStatus(""))).status
        assert status is not None
        return status.weight_version

    async def _train(self, body: bytes, key: str) -> JobInfo:
        """The job when its effect is in the served weights. Raises JobFailed; NotReady: ask again."""
        client, wait_s = self._gateway.client, self._gateway.config.http.wait_timeout_s
        job = (await client.request(Submit("", body, key), timeout_s=wait_s)).job
        assert job is not None
        async with aclosing(client.watch(job.job_id)) as events:
            async for newest, _ in events:
                job = newest
        if job.state not in ("applied", "durable"):
            raise JobFailed(f"job {job.job_id} {job.state}: {job.why_ended or 'no reason given'}")
        return job

    def _is_saved(self, path: str) -> bool:
        try:
            self._store.saved_version(path)
        except UserError:
            return False
        return True


def _saved_as(body: SaveWeights, kind: str) -> str:
    return f"tinker://{body.model_id}/{kind}/{body.path or f'step-{body.seq_id}'}"


def _require_adam(config: dict[str, Any]) -> None:
    if (kind := config.get("type", "adamw")) != "adamw":
        raise UserError(
            f"the optimizer is APOLLO here, with Adam's parameters; {kind!r} is not served",
            field="optimizer_config.type",
        )


def _require_fresh(what: str, version: int, served: int) -> None:
    if version != served:
        raise StaleSampler(
            f"{what} is of weights {version}, and the one copy of the weights is at {served}: make a "
            "new sampling client (save_weights_and_get_sampling_client), or one of kind 'inflight'",
            version,
        )
