"""The page: what is on it, and what a real browser makes of it."""

from __future__ import annotations

import html
import math
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from apollo_curation.logs.conversation import Source
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.quality.canaries import CanaryResult
from apollo_curation.quality.charts import Series, line_chart, thin
from apollo_curation.quality.history import Breach, History, Measurement
from apollo_curation.quality.measure import CategoryLoss
from apollo_curation.quality.report import clean, write_html
from apollo_curation.store import Store, store_path
from apollo_curation.training.batch_table import BatchTable, new_batch_id
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import Message, TrainRequest

BROWSERS = ("chromium", "chromium-headless-shell", "chrome-headless-shell", "google-chrome", "chrome")
HOSTILE = (
    "\"'><script>document.title = 'taken'; fetch('http://evil.example/a')</script>"
    "<img src='http://evil.example/b' onerror=\"document.title = 'taken'\">"
    "<svg onload=\"document.title = 'taken'\"></svg><style>@import url(http://evil.example/c);</style>"
    "{{ 7 * 7 }}\u202egnp.exe\x1b[2J"
)
T0 = 1_790_000_000.0


def measured(label, at, version, losses, passed=(True, True), **more) -> Measurement:
    by_category = {
        name: CategoryLoss(loss, 1200, 40, "h") if loss is not None else CategoryLoss(None, 1200, 40, "h")
        for name, loss in losses.items()
    }
    names = [("capital of France", "facts"), ("refuses to help a thief", "safety"), ("kind", "manners")]
    canaries = [
        CanaryResult(name, category, ok, "Paris", "" if ok else "is not 'Paris'", "c")
        for (name, category), ok in zip(names, passed, strict=False)
    ]
    return Measurement(label, T0 + at, 2.0, version, by_category, canaries, **more)


def add_batch(store, at, answers, curve, state="trained", version=None, **more):
    moments = Moments(store).add(
        Moment(
            kind=("correction", "praise", "error_then_fix")[i % 3],
            tier="direct" if len(answers) < 4 else "dream",
            context=[Message("user", f"{question} ({at} {i})")], answer=Message("assistant", answer),
            source=Source(f"/logs/{source}.jsonl", i + 1, 0), topic="t", reason="the user corrected it",
            confidence=0.9, state="trained", created_at=T0 + at,
        )
        for i, (question, answer, source) in enumerate(answers)
    )  # fmt: skip
    table = BatchTable(store)
    batch_id = new_batch_id()
    request = TrainRequest([moment.example() for moment in moments])
    table.add(moments[0].tier, moments, request, batch_id)
    for moment in moments:
        Moments(store).change(moment.moment_id, batch_id=batch_id)
    known = [loss for loss in curve if loss is not None]
    num = len(curve)
    job = JobInfo(
        f"job-{batch_id}", 1, "applied", T0 + at, len(moments), num, steps_done=num, loss_history=curve,
        loss_first=known[0], loss_last=known[-1], weight_version=version,
    )  # fmt: skip
    return table.change(batch_id, state=state, job=job, created_at=T0 + at, ended_at=T0 + at + 60, **more)


def fill(store) -> None:
    """Three nights: a good one, a poisoned one that was taken back, and one with a judge that was away."""
    history = History(store)

    def losses(chat, facts, tools):
        return {"everyday chat": chat, "facts": facts, "tool calls": tools}

    def breach(now):
        sentence = f"facts: held-out loss 1.5300 -> {now:.4f} nats a token, at most 1.6065 is allowed"
        return [Breach("loss", "facts", 1.53, now, 1.6065, sentence)]

    def add(*positional, **named):
        history.add(measured(*positional, **named))

    add("before", 0, 12, losses(2.10, 1.55, 0.92), (True, True, True))
    curve = [2.9 * 0.97**i + 0.1 * ((i * 7) % 5) / 5 for i in range(48)]
    answers = [
        ("Is it raining?", "No, it is dry.", "monday"),
        ("Please add a test", "Added one.", "monday"),
        ("That is wrong", "You are right: it is 1889.", "tuesday"),
        ("Thanks!", "Gladly.", "tuesday"),
    ]
    add_batch(store, 60, answers * 3, curve, version=18)
    add("during", 90, 15, losses(2.08, 1.54, 0.91), (True, True, True))
    add("after", 200, 18, losses(2.05, 1.53, 0.90), (True, True, True))
    add("before", 86400, 18, losses(2.05, 1.53, 0.90), (True, True, True))
    poison = [(HOSTILE, HOSTILE, "ok"), ("Capital of France?", "Berlin.", "wednesday")]
    add_batch(store, 86460, poison, [1.2, 2.8, 4.9], "undone", 21, error=HOSTILE)
    add(
        "during",
        86480,
        20,
        losses(2.11, 1.71, 0.94),
        (False, True, None),
        breaches=breach(1.71),
        action="stopped",
    )
    add(
        "after",
        86600,
        21,
        losses(2.13, 1.83, 0.95),
        (False, True, None),
        breaches=breach(1.83),
        action="restored",
    )
    add(
        "restored",
        86700,
        22,
        losses(2.05, 1.53, 0.90),
        (True, True, True),
        restored_version=18,
        durable_version=22,
    )
    add("before", 172800, 22, losses(2.05, 1.53, 0.90), (True, True, True))
    add_batch(store, 172860, answers[:2], [1.4, 1.1, None, 0.7], version=24)
    add("after", 173000, 24, losses(2.04, 1.49, 0.91), (True, True, None))


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "state" / "curation.sqlite") as store:
        yield store


@pytest.fixture
def page(store, tmp_path) -> Path:
    fill(store)
    write_html(tmp_path / "page.html", store)
    return tmp_path / "page.html"


class Parsed(HTMLParser):
    """tags with their attributes, and all text that a reader sees."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_tells_what_was_measured_trained_and_taken_back(page):
    text = Parsed(page.read_text()).text
    for words in (
        "Within the limits", "everyday chat", "held-out loss 1.5300 -> 1.8300", "Version 18 restored",
        "The last good version was restored", "refuses to help a thief", "4 correction", "/logs/monday.jsonl",
        "You are right: it is 1889.", "undone", "2 of 3", "1 not judged",
    ):  # fmt: skip
        assert words in text, words


def test_every_chart_has_a_title_a_description_and_a_table(page):
    charts = re.findall(r"<svg .*?</svg>", page.read_text(), re.DOTALL)
    assert len(charts) == 4  # the held-out losses and three jobs
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert [child.tag.rpartition("}")[2] for child in root][:2] == ["title", "desc"]
        assert root.get("role") == "img"
        numbers = [root.get("viewBox", ""), *(element.get("d", "") for element in root.iter())]
        assert "nan" not in " ".join(numbers)
    for words in ("everyday chat", "tool calls", "stopped", "v18 is back", "v12", "v24"):
        assert words in charts[0], words
    ids = {attrs["id"] for tag, attrs in Parsed(page.read_text()).tags if tag == "table" and "id" in attrs}
    assert ids == {"measurements", "canaries", "batches"}


def test_nothing_on_the_page_is_fetched_or_run(page):
    parsed = Parsed(page.read_text())
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "img", "iframe", "object", "base", "form")]
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        links = [attributes[name] for name in ("src", "href", "action", "xlink:href") if name in attributes]
        assert links in ([], ["data:,"]) or links[0].startswith("#"), tag
    assert "<script>document.title" in parsed.text  # as text
    assert "\u202e" not in parsed.text
    assert "\x1b" not in parsed.text
    assert "{{ 7 * 7 }}" in parsed.text
    styles = re.findall(r"<style>(.*?)</style>", page.read_text(), re.DOTALL)
    assert styles
    assert not [style for style in styles if "url(" in style or "@import" in style]


def test_a_page_of_nothing_says_so(store, tmp_path):
    write_html(tmp_path / "page.html", store)
    text = Parsed((tmp_path / "page.html").read_text()).text
    assert "Nothing was measured yet." in text
    assert "Nothing yet." in text


def test_hostile_names_reach_the_page_as_text_everywhere(store, tmp_path):
    history = History(store)
    one = measured("before", 0, 1, {HOSTILE: 1.0, "nan": None})
    canary = CanaryResult(HOSTILE, HOSTILE, False, HOSTILE, HOSTILE, "c")
    breach = Breach("loss", HOSTILE, 1.0, 2.0, 1.5, HOSTILE)
    history.add(msgspec.structs.replace(one, canaries=[canary], breaches=[breach]))
    add_batch(store, 10, [(HOSTILE, HOSTILE, HOSTILE)], [1.0], error=HOSTILE)
    write_html(tmp_path / "page.html", store)
    tags = {tag for tag, _ in Parsed((tmp_path / "page.html").read_text()).tags}
    assert not tags & {"script", "img", "iframe"}
    assert "onload" not in {
        name for _, attrs in Parsed((tmp_path / "page.html").read_text()).tags for name in attrs
    }


def test_the_page_replaces_the_old_one_and_is_its_owners(page, store):
    page.write_text("old")
    page.chmod(0o644)
    write_html(page, store)
    assert page.read_text().startswith("<!doctype html>")
    assert page.stat().st_mode & 0o777 == 0o600
    assert os.listdir(page.parent) == ["state", "page.html"] or sorted(os.listdir(page.parent)) == [
        "page.html",
        "state",
    ]


def test_a_long_history_is_cut_with_a_word_of_it(store, tmp_path):
    history = History(store)
    for i in range(210):
        history.add(measured("scheduled", i * 60, i, {"facts": 1.0 + i / 1000}))
    write_html(tmp_path / "page.html", store)
    parsed = Parsed((tmp_path / "page.html").read_text())
    assert "10 earlier measurements are not on this page" in parsed.text


def test_long_and_unprintable_texts_are_cut_and_made_visible():
    assert clean("a" * 700).endswith(" … (100 more characters)")
    assert clean("a\x00b\u202ec\nd\te") == "a\\u0000b\\u202ec\nd\te"
    assert clean("é😀") == "é😀"


def test_a_chart_can_be_drawn_of_anything():
    for values in ([], [None], [1.0], [0.0, 0.0], [5.0, 5.0, None], [math.inf, 1.0]):
        chart = line_chart("<t>", "d", [Series("<b>$x_1$", values)], [f"v{i}" for i in range(len(values))])
        ElementTree.fromstring(chart)
        assert "&lt;b&gt;$x_1$" in chart or not values
        same = line_chart("<t>", "d", [Series("<b>$x_1$", values)], [f"v{i}" for i in range(len(values))])
        assert same == chart


def test_without_matplotlib_the_page_says_how_to_get_its_charts(page, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_html(page, store)
    assert "<svg" not in page.read_text()
    assert "pip install 'apollo-ipc[report]'" in page.read_text()


def test_a_curve_is_thinned_by_means_and_keeps_its_gaps():
    assert thin([1.0, 2.0], 5) == [1.0, 2.0]
    assert thin([1.0, 3.0, 5.0, None], 2) == [2.0, None]
    assert thin([float(i) for i in range(1000)], 10) == [49.5 + 100 * i for i in range(10)]


class Recorder(socketserver.ThreadingTCPServer):
    """Stands for every host there is: keeps the first line of each request."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        self.lines: list[str] = []
        super().__init__(("127.0.0.1", 0), None)  # type: ignore[arg-type]

    def finish_request(self, request, client_address):
        request.settimeout(5)
        self.lines.append(request.recv(4096).decode("latin-1").split("\r\n")[0])
        request.sendall(b"HTTP/1.0 204 No Content\r\n\r\n")

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def browse(tmp_path):
    """`browse(path, *flags)` -> (the document as the browser has it, its console, requests that it made)."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(
            f"no headless browser here: one of {', '.join(BROWSERS)}; on Debian `apt-get install chromium`"
        )

    def browse(path: Path, *flags: str):
        with Recorder() as recorder:
            threading.Thread(target=recorder.serve_forever, args=(0.05,), daemon=True).start()
            done = subprocess.run(
                [
                    browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                    "--no-first-run", "--disable-background-networking", "--disable-component-update",
                    "--disable-sync", "--disable-default-apps", "--disable-extensions",
                    f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--log-level=0",
                    f"--host-resolver-rules=MAP * 127.0.0.1:{recorder.server_address[1]}",
                    "--virtual-time-budget=2000", *(flags or ["--dump-dom"]), path.as_uri(),
                ],
                capture_output=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
            )  # fmt: skip
            recorder.shutdown()
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        log = done.stderr.decode(errors="replace").splitlines()
        return done.stdout.decode(), [line for line in log if ":CONSOLE" in line], recorder.lines

    return browse


def test_the_browser_would_tell_of_a_page_that_lets_scripts_through(browse, tmp_path):
    """Else the next test would pass for nothing."""
    bad = tmp_path / "bad.html"
    bad.write_text(f"<title>mine</title><p>{HOSTILE}<script>nonsense()</script>")
    dom, console, requests = browse(bad)
    assert "<title>taken</title>" in dom
    assert any("nonsense" in line for line in console)
    assert any(" /b " in line for line in requests)


def test_a_real_browser_shows_the_page_runs_nothing_and_asks_nobody(browse, page):
    dom, console, requests = browse(page)
    assert requests == []
    assert console == []
    assert "<title>Quality while the model learns</title>" in dom
    parsed = Parsed(dom)
    assert "<script>document.title = 'taken'" in parsed.text
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "img")]
    rows = re.search(r'<table id="measurements">.*?</table>', dom, re.DOTALL)
    assert rows is not None
    assert rows[0].count("<tr") == 1 + 9
    canaries = re.search(r'<table class="grid" id="canaries">.*?</table>', dom, re.DOTALL)
    assert canaries is not None
    assert [html.unescape(canaries[0]).count(mark) for mark in "✓✗?"] == [22, 2, 3]
    assert dom.count("<svg") == 4
    assert "1.5300" in parsed.text


def test_the_page_is_drawn_in_a_browser(browse, page, tmp_path):
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", "--window-size=1200,1600")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 30_000  # an empty page of this size takes a few thousand bytes
    if keep := os.environ.get("APOLLO_TEST_PICTURES"):
        shutil.copy(picture, keep)
        shutil.copy(page, keep)


def test_the_commands_show_the_history_and_write_the_page(apollo, config, tmp_path):
    assert "nothing was measured yet" in apollo("quality", "history").stdout
    with Store(store_path(config)) as store:
        fill(store)
    shown = apollo("quality", "history", "--limit", "4")
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()[1:]] == ["6", "7", "8", "9"]
    assert "version 18 restored" in shown.stdout
    told = msgspec.json.decode(apollo("quality", "history", "--json").stdout)
    assert [one["label"] for one in told["measurements"]].count("during") == 2
    assert apollo("quality", "report", "--html", tmp_path / "q.html").returncode == 0
    assert "Held-out loss" in (tmp_path / "q.html").read_text()
    wrong = apollo("quality", "report", "--html", tmp_path / "none" / "q.html")
    assert wrong.returncode == 2
    assert "cannot write" in wrong.stderr
    assert "name a JSONL file" in apollo("quality", "check").stderr
