"""What a real browser makes of the page."""

from __future__ import annotations

import html
import os
import re
import shutil
import socketserver
import subprocess
import threading
from pathlib import Path

import pytest
from quality_page import HOSTILE, Parsed

BROWSERS = ("chromium", "chromium-headless-shell", "chrome-headless-shell", "google-chrome", "chrome")


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
