"""Prometheus metrics beside vLLM's own, on the same /metrics.

Several API servers share one PROMETHEUS_MULTIPROC_DIR (vllm/v1/metrics/prometheus.py): gauges say how their
values merge, and none is computed at scrape time, which that mode does not support.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

weight_version = Gauge(
    "apollo_weight_version", "Version of the served weights.", multiprocess_mode="mostrecent"
)
worker_up = Gauge("apollo_worker_up", "1 while the training worker answers.", multiprocess_mode="mostrecent")
_requests = Counter("apollo_train_requests", "Answered requests.", ["method", "route", "status"])
cache_drop_seconds = Histogram(
    "apollo_cache_drop_seconds",
    "Time of one drop of the prefix cache after an update of the weights.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
cache_drop_failures = Counter("apollo_cache_drop_failures", "Drops of the prefix cache that failed.")


def count_request(route: str, method: str, status: int) -> None:
    """apollo_train_requests_total{method, route (the template, not the path), status}."""
    _requests.labels(method, route, str(status)).inc()
