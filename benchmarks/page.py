"""The page at /train/ui: weight, first paint, frame times under load; token latency with it open and closed.

    python benchmarks/page.py URL --key "$(apollo-ipc key)" [--axe axe-core/axe.min.js] [--tokens 40]
    python benchmarks/page.py --serve MODEL_DIR --jobs 10000 [--axe ...] [--tokens 40]

Of a running server; or of one that is started, with a stand-in for the worker that makes some 200 events a
second and has that many jobs (page_server.py). "in the browser": 200 events a second reach the page, past the
stream's own limit. With --tokens: streams of that many tokens, in turn with no page open and with one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from page_server import busy_server
from playwright.sync_api import Browser, Page, sync_playwright

EVENTS_PER_S = 200
LOAD_S = 5.0
STREAMS = 8  # in each state of the page
OPEN_S = 1.5  # the page has drawn what it begins with
STATUS_S = 3.0  # STATUS_MS of static/app.js
# Stands for the browser's own, and says of a job what `--load` asks for.
EVENTS = """
window.EventSource = class {
  constructor() {
    this.on = {}; this.readyState = 1; this.step = 0; this.sent = 0;
    setTimeout(() => this.onopen?.());
    const started = performance.now();
    setInterval(() => {
      while (this.sent < (performance.now() - started) / 1000 * RATE) this.send();
    }, 5);
  }
  addEventListener(name, listener) { this.on[name] = listener; }
  close() {}
  send() {
    this.sent++; this.step += 1; window.numEvents = this.sent;
    const at = {job_id: 'job-01', steps_done: this.step, num_steps: 5000};
    const job = {...at, seq: 1, state: 'running', num_examples: 5, loss_first: 3, created_at: 1,
      loss_last: 3 / Math.sqrt(this.step), loss_history: null, paused_at: null};
    const progress = {...at, activity: 'training', loss: job.loss_last};
    const beat = {is_up: true, attached: true, weight_version: 3, progress};
    const [name, data] = this.step % 2 ? ['job', job] : ['beat', beat];
    this.on[name]?.({data: JSON.stringify(data)});
  }
};
window.EventSource.CLOSED = 2;
"""
FRAMES = """
seconds => new Promise(done => {
  const times = []; let before = performance.now(); const end = before + seconds * 1000;
  const frame = now => {
    times.push(now - before);
    before = now;
    now < end ? requestAnimationFrame(frame) : done(times);
  };
  requestAnimationFrame(frame);
})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url", nargs="?")
    parser.add_argument("--key")
    parser.add_argument("--serve", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--axe", help="axe.min.js of the package axe-core: the page is checked with it")
    parser.add_argument("--tokens", type=int, default=0)
    args = parser.parse_args()
    if args.serve is None:
        measure(args)
        return
    with busy_server(args.serve, args.jobs) as (args.url, args.key):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    found: dict[str, object] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed_browser(), args=["--no-sandbox"])
        found |= busy(args)
        found |= weight_and_paint(browser, args)
        found |= frames(browser, args)
        if args.axe:
            found["axe"] = axe(browser, args)
        if args.tokens:
            found |= token_latency(browser, args)
        browser.close()
    print(json.dumps(found, indent=2))


def installed_browser() -> str | None:
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def busy(args: argparse.Namespace) -> dict[str, object]:
    """What the worker has to do, and how many steps it makes a second."""
    with httpx.Client(base_url=args.url, headers={"Authorization": f"Bearer {args.key}"}) as http:
        steps = []
        for _ in range(2):
            steps.append((http.get("/train/status").json()["progress"]["steps_done"], time.perf_counter()))
            time.sleep(LOAD_S)
        status = http.get("/train/status").json()
    (before, began), (after, ended) = steps
    return {"jobs": status["num_jobs"], "worker_steps_per_s": round((after - before) / (ended - began))}


@contextmanager
def entered(browser: Browser, args: argparse.Namespace, script: str = "", **options) -> Iterator[Page]:
    context = browser.new_context(base_url=args.url, **options)
    page = context.new_page()
    if script:
        page.add_init_script(script)
    page.goto("/train/ui")
    page.get_by_label("Train key").fill(args.key)
    page.get_by_role("button", name="Log in").click()
    page.locator("#doing").wait_for()
    yield page
    context.close()


def weight_and_paint(browser: Browser, args: argparse.Namespace) -> dict[str, object]:
    context = browser.new_context(base_url=args.url)
    page, sizes = context.new_page(), []
    page.on("response", lambda response: sizes.append(len(response.body())))
    page.goto("/train/ui", wait_until="networkidle")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return {"page_kb": round(sum(sizes) / 1000, 1), "first_contentful_paint_ms": round(paint)}


def frames(browser: Browser, args: argparse.Namespace) -> dict[str, object]:
    result = {}
    of_browser = EVENTS.replace("RATE", str(EVENTS_PER_S))
    for name, script in (("by the server", ""), ("in the browser", of_browser)):
        with entered(browser, args, script) as page:
            page.wait_for_timeout(1500)
            before = page.evaluate("window.numEvents || 0")
            times = sorted(page.evaluate(FRAMES, LOAD_S))
            events = (page.evaluate("window.numEvents || 0") - before) / LOAD_S
            assert page.locator("#jobs th").count() > 0 or not args.serve, "the queue is shown"
        result[name] = {
            **({"events_per_s": round(events)} if script else {}),
            "frame_ms_p50": round(statistics.median(times), 1),
            "frame_ms_p99": round(times[int(0.99 * (len(times) - 1))], 1),
            "frame_ms_max": round(times[-1], 1),
        }
    return {"frames": result}


def axe(browser: Browser, args: argparse.Namespace) -> dict[str, list[str]]:
    """impact -> rules that are broken, in the light and in the dark, on a screen and on a phone."""
    broken: dict[str, set[str]] = {}
    for scheme, width in itertools.product(("light", "dark"), (1280, 360)):
        looks = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
        with entered(browser, args, bypass_csp=True, **looks) as page:
            page.wait_for_timeout(1000)
            page.add_script_tag(path=args.axe)
            for violation in page.evaluate("axe.run().then(result => result.violations)"):
                broken.setdefault(violation["impact"], set()).add(violation["id"])
    return {impact: sorted(rules) for impact, rules in broken.items()}


def token_latency(browser: Browser, args: argparse.Namespace) -> dict[str, object]:
    """Seconds between tokens of streams, in turn with the page closed, open, and heard: its requests alone,
    as where the browser is on another machine. Its own work is that of this one's cores."""
    gaps: dict[str, list[float]] = {"closed": [], "heard": [], "open": []}
    keyed = {"Authorization": f"Bearer {args.key}"}
    with httpx.Client(base_url=args.url, headers=keyed, timeout=300) as http:
        model = http.get("/train/v1/models").json()["data"][0]["id"]
        stream(http, model, args.tokens)
        turns = ("closed", "heard", "open", "open", "heard", "closed")
        for turn in itertools.islice(itertools.cycle(turns), 3 * STREAMS):
            with OPENERS[turn](browser, args):
                time.sleep(OPEN_S)
                gaps[turn] += stream(http, model, args.tokens)
    ms = {name: [1000 * gap for gap in sorted(some)] for name, some in gaps.items()}
    p50 = {name: statistics.median(some) for name, some in ms.items()}
    p99 = {name: some[int(0.99 * (len(some) - 1))] for name, some in ms.items()}
    return {
        "token_ms": {name: {"p50": round(p50[name], 1), "p99": round(p99[name], 1)} for name in ms},
        "to_closed": {
            name: {"p50": round(p50[name] / p50["closed"], 3), "p99": round(p99[name] / p99["closed"], 3)}
            for name in ("heard", "open")
        },
    }


@contextmanager
def closed(browser: Browser, args: argparse.Namespace) -> Iterator[None]:
    yield


@contextmanager
def heard(browser: Browser, args: argparse.Namespace) -> Iterator[None]:
    """What an open page asks (static/app.js), by a thread."""
    over = threading.Event()
    keyed = {"Authorization": f"Bearer {args.key}"}

    def listen() -> None:
        with (
            httpx.Client(base_url=args.url, headers=keyed, timeout=60) as http,
            http.stream("GET", "/train/ui/events") as events,
        ):
            for _ in events.iter_raw():
                if over.is_set():
                    return

    def ask() -> None:
        with httpx.Client(base_url=args.url, headers=keyed, timeout=10) as http:
            for look in itertools.count():
                http.get("/train/status")
                if look % 2 == 0:
                    http.get("/metrics")
                if look % 10 == 0:
                    http.get("/train/jobs?limit=26")
                    http.get("/train/jobs?limit=1000")
                if over.wait(STATUS_S):
                    return

    threads = [threading.Thread(target=work, daemon=True) for work in (listen, ask)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join(15)


OPENERS = {"closed": closed, "heard": heard, "open": entered}


def stream(http: httpx.Client, model: str, num_tokens: int) -> list[float]:
    body = {"model": model, "prompt": "The weather", "max_tokens": num_tokens, "ignore_eos": True}
    times = []
    with http.stream("POST", "/train/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


if __name__ == "__main__":
    main()
