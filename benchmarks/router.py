"""What POST /train costs beside a handler that answers at once: router, ZMQ, worker, commit.

    python benchmarks/router.py [--requests 1000] [--json FILE]

Three processes on one machine, loopback only: this client, a uvicorn server (our routes and a plain `/direct`
route that parses the same body and answers), a worker's service with a real queue. All kinds of request are
interleaved in blocks within one run, through one client whose cost is the same for each. `GET /train/status`
takes the same way without the commit, whose own time is measured between the blocks of requests, in a second
queue on the same file system.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apollo_worker.jobs.example import TokenisedExample, request_digest
from apollo_worker.jobs.job_plan import JobPlan
from apollo_worker.jobs.queue import JobQueue
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table
from starlette.requests import Request
from starlette.responses import JSONResponse

from apollo_ipc.wire.requests import parse_train_body

KEY = "benchmark"
BODY = json.dumps({"examples": [{"prompt": "What is 2 + 2?", "completion": "2 + 2 is 4."}]}).encode()
PLAN = JobPlan(
    [TokenisedExample([*range(24)], [False] * 12 + [True] * 12)],
    [bytes(32)],
    1,
    1,
    1e-5,
    0.0,
    "constant",
    0.1,
)
KINDS = {
    "direct": "POST /direct",
    "status": "GET /train/status",
    "train": "POST /train",
    "commit": "SQLite's commit, alone",
}
CONNECTIONS = (1, 32)
BLOCK = 50  # requests of one kind before the next kind's turn
WARM_UP = 50
MAX_QUEUED = 10**9
TIMEOUT_S = 120.0


# --- the two other processes ---


def serve() -> None:
    """Prints its port; ends when it is told to."""
    import uvicorn
    from apollo_router.plugin import ApolloEndpoints

    app = FastAPI()
    ApolloEndpoints().attach_router(app)

    @app.post("/direct")
    async def direct(request: Request) -> JSONResponse:
        parsed = parse_train_body(await request.body())
        return JSONResponse({"job_id": "none", "status": "queued", "num_examples": len(parsed.examples)}, 202)

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await serving

    asyncio.run(run())


def work() -> None:
    """Prints a line when it serves; ends when stdin closes."""
    from apollo_worker.front.server import Server
    from apollo_worker.link.status_board import Admission, StatusBoard

    from apollo_ipc.config import load_config

    config = load_config()
    queue = JobQueue(config.state_dir / "queue.sqlite", max_queued=MAX_QUEUED)
    service = Server(config, StatusBoard(lambda _: Admission(PLAN)), queue)
    service.start()
    print("serving", flush=True)
    sys.stdin.read()
    service.stop()


# --- the client ---


def encode(kind: str) -> bytes:
    body = b"" if kind == "status" else BODY
    head = (
        f"{KINDS[kind]} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection:
    """One kept-alive HTTP/1.1 connection."""

    async def open(self, port: int) -> Connection:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def ask(self, request: bytes) -> float:
        """Seconds from the first byte sent to the last received. Raises RuntimeError unless it is a 2xx."""
        started = time.perf_counter()
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await self.reader.readexactly(length)
        duration_s = time.perf_counter() - started
        if not head.startswith(b"HTTP/1.1 2"):
            raise RuntimeError(f"{head!r} {body!r}")
        return duration_s


async def measure(
    port: int, queue: JobQueue, num_connections: int, num_requests: int
) -> dict[str, list[float]]:
    """Times (s) of `num_requests` requests of each kind, and of as many commits, in interleaved blocks."""
    connections = [await Connection().open(port) for _ in range(num_connections)]
    times_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    encoded = {kind: encode(kind) for kind in KINDS if kind != "commit"}
    digest = request_digest(parse_train_body(BODY))

    async def block(kind: str, num: int) -> None:
        left = iter(range(num))
        if kind == "commit":
            for _ in left:
                started = time.perf_counter()
                queue.submit(PLAN, digest)
                times_s[kind].append(time.perf_counter() - started)
            return

        async def one(connection: Connection) -> None:
            for _ in left:  # board: whichever connection is free takes the next
                times_s[kind].append(await connection.ask(encoded[kind]))

        await asyncio.gather(*(one(connection) for connection in connections))

    for kind in KINDS:
        await block(kind, WARM_UP)
    for kind in KINDS:
        times_s[kind].clear()
    order = list(KINDS)
    for start in range(0, num_requests, max(BLOCK, 2 * num_connections)):
        for kind in order:
            await block(kind, min(max(BLOCK, 2 * num_connections), num_requests - start))
        order.append(order.pop(0))  # no kind always follows the same other one
    for connection in connections:
        connection.writer.close()
    return times_s


def quantile_ms(times_s: list[float], q: float) -> float:
    ordered = sorted(times_s)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--requests", type=int, default=1000, help="of each kind, at each number of connections"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--role", choices=("client", "serve", "work"), default="client", help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.role != "client":
        return serve() if args.role == "serve" else work()
    figures = asyncio.run(run(args.requests))
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


async def run(num_requests: int) -> dict:
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as base:
        environ = os.environ | {
            "APOLLO_PATHS__RUNTIME_DIR": f"{base}/run",
            "APOLLO_PATHS__STATE_DIR": f"{base}/state",
            "APOLLO_HTTP__TRAIN_KEY": KEY,
        }
        processes: list[subprocess.Popen] = []

        async def start(role: str) -> str:
            command = [sys.executable, __file__, "--role", role]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            processes.append(process := subprocess.Popen(command, env=environ, text=True, **pipes))
            line = await asyncio.to_thread(process.stdout.readline)
            if not line:
                raise SystemExit(f"the {role} process did not start")
            return line

        queue = JobQueue(Path(base) / "alone" / "queue.sqlite", max_queued=MAX_QUEUED)
        try:
            await start("work")
            port = int(await start("serve"))
            figures = {"requests": num_requests, "cores": os.cpu_count(), "rows": []}
            for num_connections in CONNECTIONS:
                async with asyncio.timeout(TIMEOUT_S):
                    times_s = await measure(port, queue, num_connections, num_requests)
                for kind, times in times_s.items():
                    figures["rows"].append(
                        {
                            "connections": num_connections,
                            "kind": kind,
                            "p50_ms": quantile_ms(times, 0.5),
                            "p99_ms": quantile_ms(times, 0.99),
                            "mean_ms": statistics.fmean(times) * 1e3,
                        }
                    )
            return figures
        finally:
            queue.close()
            for process in processes:
                process.terminate()
                process.wait(10)


def show(figures: dict) -> None:
    title = f"POST /train against a handler that answers at once ({figures['requests']} requests each)"
    table = Table(title=title)
    for name in ("conns", "request", "p50 ms", "p99 ms", "p50/floor", "p99/floor"):
        table.add_column(name, justify="left" if name == "request" else "right", no_wrap=True)
    floor: dict = {}
    for row in figures["rows"]:
        if row["kind"] == "direct":
            floor = row
        ratios = [f"{row[q] / floor[q]:.2f}x" for q in ("p50_ms", "p99_ms")]
        name = KINDS[row["kind"]] + (" = floor" if row is floor else "")
        table.add_row(str(row["connections"]), name, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", *ratios)
    console = Console()
    console.print(table)
    mean_ms = {(row["kind"], row["connections"]): row["mean_ms"] for row in figures["rows"]}
    for num in CONNECTIONS:
        # One thread commits: of n requests at once each waits for n commits. Means, since those add up.
        commits_ms, train_ms = mean_ms["commit", num] * num, mean_ms["train", num]
        console.print(
            f"{num} connections: POST /train {train_ms:.2f} ms on average, "
            f"{num} commits {commits_ms:.2f} ms ({commits_ms / train_ms:.0%})"
        )


if __name__ == "__main__":
    main()
