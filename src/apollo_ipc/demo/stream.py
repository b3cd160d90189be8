"""A steady stream of completions beside training, and how long each took."""

from __future__ import annotations

import threading
import time
from collections import defaultdict

import httpx
import numpy as np

TOKENS = 16
PAUSE_S = 0.02  # a person's stream, not a load test


class CompletionStream:
    """Asks for one short completion after another in a thread, under the label that is set when it begins.

    A completion that runs across a change of label counts as served but is in no latency.
    """

    def __init__(self, url: str, model: str):
        self._url, self._model = url, model
        self._label: str | None = None
        self._latencies: dict[str, list[float]] = defaultdict(list)
        self.num_served = 0
        self.num_served_by_label: dict[str, int] = defaultdict(int)
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="completions", daemon=True)

    def __enter__(self) -> CompletionStream:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def label(self, name: str | None) -> None:
        self._label = name

    def _run(self) -> None:
        number = 0
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                number += 1
                label, started = self._label, time.perf_counter()
                try:
                    response = client.post(
                        "/v1/completions",
                        json={
                            "model": self._model,
                            "prompt": f"Request {number}:",  # no two alike: the prefix cache is no help
                            "max_tokens": TOKENS,
                            "ignore_eos": True,
                            "temperature": 0,
                        },
                    )
                    response.raise_for_status()
                except httpx.HTTPError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                else:
                    self.num_served += 1
                    if label is not None and label == self._label:
                        self._latencies[label].append(time.perf_counter() - started)
                        self.num_served_by_label[label] += 1
                self._stop.wait(PAUSE_S)

    def percentile_s(self, label: str, percent: float) -> float | None:
        """Of the completions that ran wholly under `label`; None where there were none."""
        latencies = self._latencies[label]
        return float(np.percentile(latencies, percent)) if latencies else None
