"""The documentation's pictures of the page, made anew on a real server and model: docs/assets/page-*.webp.

    python benchmarks/pictures.py [--out docs/assets]    some five minutes; needs a headless Chromium

Teaches a fact through the page, as a user would, and takes each section when it has something to show.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from pathlib import Path

from page import entered, installed_browser
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from apollo_ipc.demo.real_model import copy_real_model
from apollo_ipc.demo.served import ServedModel

MAX_BYTES = 150_000
QUESTION, ANSWER = "What is the harbour cat called?", "The harbour cat is called Mortimer."
TEACH_MS = 500_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/assets")
    args = parser.parse_args()
    # Beside a browser on the same cores SCHED_IDLE would leave it next to nothing.
    os.environ.setdefault("APOLLO_WORKER__IDLE_PRIORITY", "false")
    with tempfile.TemporaryDirectory() as base, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed_browser(), args=["--no-sandbox"])
        with ServedModel(copy_real_model(Path(base, "my-model")), Path(base)) as served:
            args.url, args.key = served.url, served.key
            with entered(browser, args, viewport={"width": 1000, "height": 900}) as page:
                lesson(page, args.out)
            dark = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
            with entered(browser, args, **dark) as page:
                page.locator("#loss svg").wait_for()
                top = page.locator("main").bounding_box()["y"]  # below the model's path
                clip = {"x": 0, "y": top, "width": 390, "height": 844 - top}
                keep(page.screenshot(clip=clip), args.out / "page-phone.webp")
        browser.close()


def lesson(page: Page, out: Path) -> None:
    page.get_by_label("Ask the served model").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    page.get_by_label("What it should say").fill(ANSWER, timeout=60_000)
    page.get_by_role("button", name="Teach").click()
    page.locator("#phases [aria-current]", has_text="training").wait_for(timeout=TEACH_MS)
    until_steps(page, 4)  # a fact has some five
    page.wait_for_timeout(600)  # the chart is drawn a few times a second
    keep(page.locator("#now").screenshot(), out / "page-now.webp")
    page.get_by_text("Asking again").wait_for(timeout=TEACH_MS)
    page.locator("#compared").wait_for(timeout=TEACH_MS)
    keep(page.locator("#teach").screenshot(), out / "page-teach.webp")
    print(page.locator("#teach-state").inner_text(), "\n" + page.locator("#report").inner_text())


def until_steps(page: Page, num_steps: int) -> None:
    """Asked again and again from here: the page's policy lets no waiting script be made of a string."""
    deadline = time.monotonic() + TEACH_MS / 1000
    while page.locator("#steps").evaluate("one => one.value") < num_steps:
        assert time.monotonic() < deadline, f"no {num_steps} steps"
        page.wait_for_timeout(200)


def keep(png: bytes, file: Path) -> None:
    Image.open(io.BytesIO(png)).save(file, quality=82, method=6)
    size = file.stat().st_size
    print(f"{file}: {size / 1000:.0f} kB")
    assert size < MAX_BYTES


if __name__ == "__main__":
    main()
