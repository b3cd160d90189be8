"""A real browser on a page, for tests: what it said on its console, whom it asked, what it showed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

BROWSERS = ("chromium-headless-shell", "chromium", "chrome-headless-shell", "google-chrome", "chrome")

SERIOUS = """axe.run().then((result) => result.violations
  .filter((one) => ["serious", "critical"].includes(one.impact))
  .map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 80)).join(", ")}`))"""


class Looked:
    """page: Playwright's. problems: of the console, and errors of scripts; hosts: whom it asked;
    refused: what the server answered with 400 and more, which the console has as an error too."""

    def __init__(self, context, url: str, shots: Path):
        self.context, self.url, self._shots = context, url, shots
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        self.refused: set[tuple[str, int]] = set()
        self.page = self.open()

    def open(self):
        page = self.context.new_page()
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.on("response", self._on_response)
        page.set_default_timeout(15_000)
        return page

    def _on_console(self, message) -> None:
        # Of an answer of 400 and more; `refused` has it by its path.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def _on_response(self, response) -> None:
        if response.status >= 400:
            self.refused.add((urlsplit(response.url).path, response.status))

    def shot(self, name: str) -> None:
        """APOLLO_AXE: axe.min.js of the package axe-core; what it finds serious on the page is a problem."""
        self.page.screenshot(path=self._shots / f"{name}.png", full_page=True)
        if axe := os.environ.get("APOLLO_AXE"):
            self.page.evaluate(Path(axe).read_text())  # not a script of the page: its policy has no say
            self.problems += [f"axe at {name}: {found}" for found in self.page.evaluate(SERIOUS)]


def browser_path() -> str:
    """Skips the test where there is no browser."""
    pytest.importorskip("playwright", reason="`make setup` brings playwright")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no headless browser here; on Debian `apt-get install chromium-headless-shell`")
    return found


@contextmanager
def looking_at(url: str, shots: Path, **options) -> Iterator[Looked]:
    """options: of Playwright's new_context (viewport, color_scheme, ...)."""
    executable = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        try:
            yield Looked(browser.new_context(base_url=url, **options), url, shots)
        finally:
            browser.close()
