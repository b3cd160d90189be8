"""A served app with our plugin attached as vLLM does it, and a worker that only pretends to train."""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import uvicorn
from apollo_router.plugin import ApolloEndpoints
from apollo_worker.front import server as front
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import Admission, StatusBoard
from fastapi import FastAPI
from planned import plan_of
from waiting import wait_for

from apollo_ipc.config import Config, load_config
from apollo_ipc.manifest import MANIFEST_FORMAT, Manifest, start_ticks, write_manifest
from apollo_ipc.wire.replies import SyncResult
from apollo_ipc.wire.requests import TrainRequest

TRAIN_KEY = "train-key-of-the-tests"
INFERENCE_KEY = "inference-key-of-the-tests"
MAX_BODY_BYTES = 1024 * 1024
ONE = {"examples": [{"prompt": "2+2=", "completion": "4"}]}


def make_config(**http: object) -> Config:
    """Paths under /tmp: a Unix socket's is limited to 107 bytes."""
    base = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    environ = {
        "APOLLO_PATHS__RUNTIME_DIR": str(base / "run"),
        "APOLLO_PATHS__STATE_DIR": str(base / "state"),
        "APOLLO_HTTP__TRAIN_KEY": TRAIN_KEY,
        "APOLLO_TRAIN__PUBLISH_DISTANCE_S": "0",
        "APOLLO_HTTP__MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    } | {f"APOLLO_HTTP__{name.upper()}": str(value) for name, value in http.items()}
    os.environ.update(environ)  # the plugin's factory takes no arguments
    (base / "run").mkdir(mode=0o700)
    return load_config()


class FakeEngine:
    """vLLM's EngineClient, as far as the router uses it."""

    def __init__(self, *, prefix_caching=True, multimodal=False, clears=True):
        self.calls: list[tuple] = []
        self.clears = clears
        self.model_config = SimpleNamespace(
            is_multimodal_model=multimodal, max_model_len=64, logprobs_mode="raw_logprobs"
        )
        self.vllm_config = SimpleNamespace(
            kv_transfer_config=None,
            cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
            scheduler_config=SimpleNamespace(max_num_seqs=256),
        )

    async def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False) -> bool:
        self.calls.append(("reset_prefix_cache", reset_running_requests, reset_connector))
        return self.clears

    async def reset_encoder_cache(self) -> None:
        self.calls.append(("reset_encoder_cache",))


def vllm_app() -> FastAPI:
    """vLLM's order (vllm/entrypoints/launchers/app.py): its lifespan, our routes, then its handlers."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        del app.state

    app = FastAPI(lifespan=lifespan)
    app.state.apollo_plugin = plugin = ApolloEndpoints()
    plugin.attach_router(app)
    app.exception_handler(Exception)(lambda request, error: 1 / 0)
    return app


class Server:
    """The app on a real socket, in a thread. `url`, `http` (a client with the train key), `engine`."""

    def __init__(self, engine: FakeEngine | None = None):
        self.app = vllm_app()
        self.engine = engine or FakeEngine()
        config = uvicorn.Config(self.app, port=0, log_level="warning")
        self.app.state.server = self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, args=(), daemon=True)

    def __enter__(self) -> Server:
        import asyncio

        args = argparse.Namespace(api_key=[INFERENCE_KEY], model="/models/m", served_model_name=["m"])
        asyncio.run(self.app.state.apollo_plugin.init_state(self.engine, self.app.state, args))
        self.thread.start()
        wait_for(lambda: self.uvicorn.started)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = self.client(TRAIN_KEY)
        return self

    def client(self, key: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=20)

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.uvicorn.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive(), "the server does not stop"


class FakeWorker:
    """The real service and queue; training is recording a loss."""

    def __init__(self, config: Config):
        self.requests: list[TrainRequest] = []
        self.board = StatusBoard(self._admit)
        self.queue = JobQueue(config.state_dir / "queue.sqlite", config.worker.max_queued_jobs)
        self.server = front.Server(config, self.board, self.queue)

    def _admit(self, request: TrainRequest) -> Admission:
        self.requests.append(request)
        return Admission(plan_of(request, len(request.examples)), notes=["a note"])

    def __enter__(self) -> FakeWorker:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.queue.close()

    def train_one(self, ends: str = "applied", step_s: float = 0.0, error: str | None = None) -> None:
        """Takes the next job, waiting for one, and ends it in the state `ends`."""
        wait_for(lambda: self.queue.count("queued") > 0)
        job = self.queue.take()
        for step in range(1, job.info.num_steps + 1):
            time.sleep(step_s)
            self.queue.record_step(job.info.job_id, step, 2.0 / step)
        self.board.state.weight_version += 1
        self.server.publish(self.board.state.weight_version)
        self.queue.finish(job.info.job_id, ends, weight_version=self.board.state.weight_version, error=error)

    def in_background(self, function, *args, **kwargs) -> threading.Thread:
        thread = threading.Thread(target=function, args=args, kwargs=kwargs, daemon=True)
        thread.start()
        return thread

    def answer_sync(self) -> None:
        result = SyncResult(3, 1.0, 10, 2, 1, 1000, 200, 0.5)
        self.board.asked.get(timeout=5).done.set_result(result)


def share_weights(config: Config, boot_id: str, pid: int | None = None) -> None:
    """Writes a manifest as if process `pid` (default: this one) had shared its weights."""
    pid = pid or os.getpid()
    write_manifest(
        Manifest(
            format=MANIFEST_FORMAT,
            boot_id=boot_id,
            pid=pid,
            pid_start_ticks=start_ticks(pid) or 0,
            rank=0,
            world_size=1,
            model_path="/nowhere",
            served_model_name="m",
            vllm_version="0",
            torch_version="0",
            transport="shm",
            device_uuid=None,
            dtype="bfloat16",
            max_model_len=1,
            segments=[],
            tensors={},
            views={},
            refused=[],
        ),
        config.runtime_dir,
    )


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
