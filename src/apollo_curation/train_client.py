"""The training interface as curation uses it: jobs, checkpoint and restore, of the server that learns."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec

from apollo_curation.chat_client import RETRY_S, ModelAway, request_patiently
from apollo_curation.settings import CurationConfig
from apollo_ipc.errors import Conflict, NotReady, UserError
from apollo_ipc.keys import train_key
from apollo_ipc.manifest import read_manifest
from apollo_ipc.wire.messages import (
    ENDED_STATES,
    JobInfo,
    RestoreResult,
    RestoreVersion,
    SyncResult,
)
from apollo_ipc.wire.requests import SyncKind, TrainRequest

POLL_S = 0.5
REQUEST_TIMEOUT_S = 60.0
SYNC_TIMEOUT_S = 3600.0
RESTORE_TIMEOUT_S = 3600.0
PIN_WAIT_S = 900.0  # a sync of the worker's may hold the checkpoint meanwhile: minutes, for a large model


class Training:
    """`POST /train` and its relatives over HTTP with the train key; restoring over the worker's own socket,
    which has it alone. Waits for a worker or server that restarts, for `curation.patience_s`.

    Raises ModelAway when that was not enough, UserError where the request is refused.
    """

    def __init__(self, config: CurationConfig, stop: Callable[[], bool] = lambda: False):
        self._config = config
        self._patience_s = config.curation.patience_s
        self._stop = stop
        headers = {"Authorization": f"Bearer {train_key(config)}"}
        self._http = httpx.Client(
            base_url=config.curation.url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=REQUEST_TIMEOUT_S,
        )

    def submit(self, request: TrainRequest, idempotency_key: str) -> str:
        """The job's id. The same key and request give the same job, trained once: safe to send again."""
        body = msgspec.to_builtins(request)
        answer = self._request("POST", "/train", body, headers={"Idempotency-Key": idempotency_key})
        return answer["job_id"]

    def job(self, job_id: str) -> JobInfo:
        return msgspec.convert(self._request("GET", f"/train/jobs/{job_id}"), JobInfo, strict=False)

    def wait(self, job_id: str, each: Callable[[JobInfo], None] = lambda job: None) -> JobInfo:
        """The job when it has ended; `each` sees it now and then until it has."""
        while True:
            job = self.job(job_id)
            each(job)
            if job.state in ENDED_STATES:
                return job
            time.sleep(POLL_S)

    def cancel(self, job_id: str) -> None:
        """Asks for it; the job ends after its present step. One that has ended stays as it is."""
        try:
            self._request("DELETE", f"/train/jobs/{job_id}")
        except UserError as error:
            if error.code != "job_ended":
                raise

    def status(self) -> dict[str, Any]:
        return self._request("GET", "/train/status")

    def sync(self, kind: SyncKind = "full") -> SyncResult:
        """The live weights on disk."""
        answer = self._request("POST", "/checkpoint", {"kind": kind}, timeout_s=SYNC_TIMEOUT_S)
        return msgspec.convert(answer, SyncResult, strict=False)

    def restore(self, weight_version: int) -> RestoreResult:
        """An older version back in the served weights, as a new version. Asked again while a job trains."""
        from apollo_ipc.wire.client import call

        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                asked = RestoreVersion("", weight_version)
                result = call(self._config.socket_path, asked, timeout_s=RESTORE_TIMEOUT_S).restore
            except (NotReady, Conflict) as error:
                if isinstance(error, Conflict) and error.code != "job_running":
                    raise
                if time.monotonic() >= deadline or self._stop():
                    raise ModelAway(f"version {weight_version} could not be restored: {error}") from None
                time.sleep(RETRY_S)
                continue
            assert result is not None
            return result

    def pin(self, weight_version: int) -> None:
        """Has that version stay restorable, instead of the one before. Raises NotReady where no model is
        served on this machine, UserError where that version is gone, CheckpointError."""
        from apollo_ipc.checkpoint import pin_version

        manifest = read_manifest(self._config.runtime_dir)
        if manifest is None:
            raise NotReady("no model is being served here, so its checkpoint cannot be found")
        pin_version(Path(manifest.model_path), weight_version, lock_wait_s=PIN_WAIT_S)

    def close(self) -> None:
        self._http.close()

    def _request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        if timeout_s is not None:
            with httpx.Client(
                base_url=self._http.base_url, headers=self._http.headers, timeout=timeout_s
            ) as http:
                return request_patiently(
                    http, method, path, body, patience_s=self._patience_s, stop=self._stop, headers=headers
                ).json()
        return request_patiently(
            self._http, method, path, body, patience_s=self._patience_s, stop=self._stop, headers=headers
        ).json()
