"""The training interface as curation uses it: jobs, checkpoint, restore and pin of the server that learns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec

from apollo_curation.chat_client import RETRY_S, ModelAway, ServerRefused, request_patiently
from apollo_curation.settings import CurationConfig
from apollo_ipc.keys import train_key
from apollo_ipc.wire.replies import ENDED_STATES, JobInfo, RestoreResult, SyncResult
from apollo_ipc.wire.requests import TrainRequest

POLL_S = 0.5
REQUEST_TIMEOUT_S = 60.0
CHECKPOINT_TIMEOUT_S = 3600.0  # a sync, a restore, or a pin behind a sync: minutes, for a large model


class TrainClient:
    """`POST /train` and its relatives with the train key. Waits for a worker or server that restarts, for
    `curation.patience_s`.

    Raises ModelAway when that was not enough, ServerRefused where the request is refused.
    """

    def __init__(self, config: CurationConfig, stop: Callable[[], bool] = lambda: False):
        self._patience_s = config.curation.patience_s
        self._stop = stop
        self._http = httpx.Client(
            base_url=config.curation.url.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {train_key(config)}"},
            timeout=REQUEST_TIMEOUT_S,
        )

    def submit(self, request: TrainRequest, idempotency_key: str) -> str:
        """The job's id. The same key and request give the same job, trained once: safe to send again."""
        body = msgspec.to_builtins(request)
        return self._request("POST", "/train", body, headers={"Idempotency-Key": idempotency_key})["job_id"]

    def job(self, job_id: str) -> JobInfo:
        return msgspec.convert(self._request("GET", f"/train/jobs/{job_id}"), JobInfo, strict=False)

    def jobs(self) -> list[JobInfo]:
        """The newest first, a thousand at most."""
        return msgspec.convert(
            self._request("GET", "/train/jobs?limit=1000")["data"], list[JobInfo], strict=False
        )

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
        except ServerRefused as error:
            if error.code != "job_ended":
                raise

    def status(self) -> dict[str, Any]:
        return self._request("GET", "/train/status")

    def sync(self) -> SyncResult:
        """The live weights on disk."""
        answer = self._request("POST", "/checkpoint", {"kind": "full"}, timeout_s=CHECKPOINT_TIMEOUT_S)
        return msgspec.convert(answer, SyncResult, strict=False)

    def restore(self, weight_version: int) -> RestoreResult:
        """An older version back in the served weights, as a new version. Asked again while a job trains."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                answer = self._request(
                    "POST",
                    "/checkpoint/restore",
                    {"version": weight_version},
                    timeout_s=CHECKPOINT_TIMEOUT_S,
                )
                return msgspec.convert(answer, RestoreResult, strict=False)
            except ServerRefused as error:
                if error.code != "job_running":
                    raise
                if time.monotonic() >= deadline or self._stop():
                    raise ModelAway(f"version {weight_version} could not be restored: {error}") from None
            time.sleep(RETRY_S)

    def pinned(self) -> int | None:
        """The version that is pinned, by whomever."""
        versions = self._request("GET", "/checkpoint/history")["versions"]
        return next((one["weight_version"] for one in versions if one["is_pinned"]), None)

    def pin(self, weight_version: int | None) -> None:
        """Has that version stay restorable, instead of the one that was pinned before; None: none."""
        body = {"version": weight_version}
        self._request("POST", "/checkpoint/pin", body, timeout_s=CHECKPOINT_TIMEOUT_S)

    def close(self) -> None:
        self._http.close()

    def _request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> dict[str, Any]:
        return request_patiently(
            self._http,
            method,
            path,
            body,
            patience_s=self._patience_s,
            stop=self._stop,
            headers=headers,
            timeout_s=timeout_s,
        ).json()
