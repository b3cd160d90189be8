"""The page at /train/ui, in a real browser, before a server that stands in for vLLM.

Routes, worker front, queue and files are the real ones; model and trainer are scripted.
"""

from __future__ import annotations

import json
import re
import time

import pytest
from apollo_router import session
from apollo_router.ui.routes import static_files
from apollo_worker.jobs.queue import JobQueue
from browser import looking_at
from planned import submit
from router_harness import INFERENCE_KEY, ONE, TRAIN_KEY
from starlette.requests import Request
from ui_world import HOSTILE, UI, WRONG_KEY, assert_clean, enter, over
from waiting import wait_for

from apollo_curation.quality.canaries import CanaryResult
from apollo_curation.quality.history import Breach, Measurement, QualityHistory
from apollo_curation.quality.measure import CategoryLoss
from apollo_curation.store import Store
from apollo_ipc.wire.requests import Example, TrainRequest

POST = {"x-apollo-ui": "1"}


# --- the session, without a browser ---


def login(server, key=TRAIN_KEY, **headers):
    client = server.client(None)
    ours = {**POST, "origin": server.url, **headers}
    return client, client.post(f"{UI}/login", json={"key": key}, headers=ours)


def test_the_page_and_its_files_are_open_light_and_forbid_everything_foreign(server):
    client = server.client(None)
    total = 0
    for name in ("", *(f"/static/{name}" for name in static_files())):
        answer = client.get(UI + name)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "trusted-types" in policy
        total += len(answer.content) if name else 0
        assert client.get(UI + name, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    assert total < 150_000
    assert client.get(f"{UI}/static/..%2froutes.py").status_code == 404


def test_no_file_of_the_page_makes_markup_of_text_or_names_a_host():
    for name, file in static_files().items():
        text = file.content.decode()
        # The namespace of SVG is a name, and is fetched by nobody.
        assert set(re.findall(r"https?://([\w.]+)", text)) <= {"www.w3.org"}, name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=|style=", text
        ), name


def test_a_login_gives_a_cookie_that_scripts_cannot_read_and_that_stays_here(server, worker):
    client, answer = login(server)
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/", "max-age=3600"} <= set(cookie.split("; "))
    assert TRAIN_KEY not in answer.headers["set-cookie"]
    wait_for(lambda: client.get("/train/status").status_code == 200)
    assert client.get(f"{UI}/session").json()["model"] == "m"


def test_a_wrong_key_and_the_inference_key_log_nobody_in(server):
    for key in ("", "wrong", INFERENCE_KEY):
        client, answer = login(server, key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_train_key")
        assert client.get(f"{UI}/session").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://127.0.0.1:1"},  # another port is another origin, though the same site
        {"origin": ""},
        {"x-apollo-ui": ""},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "none"},
    ],
)
def test_a_session_changes_nothing_for_a_page_from_elsewhere(server, worker, headers):
    client, _ = login(server)
    ours = {**POST, "origin": server.url}
    wait_for(lambda: client.post("/train", json=ONE, headers=ours).status_code == 202)
    before = worker.queue.count("queued")
    refused = client.post("/train", json=ONE, headers={**ours, **headers})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "wrong_origin")
    assert login(server, **headers)[1].status_code == 403
    assert worker.queue.count("queued") == before


def test_a_proxy_that_changes_the_host_is_told_what_to_keep(server):
    _, answer = login(server, host="behind.test:9")
    assert answer.status_code == 403
    assert "names behind.test:9; a proxy has to keep `Host`" in answer.json()["error"]["message"]


def test_reading_is_for_the_own_page_too(server, worker):
    client, _ = login(server)
    for site in ("same-site", "cross-site", "none"):
        assert client.get(f"{UI}/session", headers={"sec-fetch-site": site}).status_code == 403
    assert client.get(f"{UI}/session", headers={"sec-fetch-site": "same-origin"}).status_code == 200


def test_a_session_ends_by_time_by_another_key_and_by_a_changed_byte():
    now = 1_800_000_000.0
    one = session.new_session("key", now)
    assert session.expires_at(one, "key", now) == now + session.LIFETIME_S
    assert session.expires_at(one, "key", now + session.LIFETIME_S) is None
    assert session.expires_at(one, "other", now) is None
    end, nonce, signature = one.split(".")
    for forged in (
        f"{int(end) + 9}.{nonce}.{signature}",
        f"{end}.{nonce}",
        f"{end}.{nonce}.",
        "",
        ".",
        "..",
        "é",
    ):
        assert session.expires_at(forged, "key", now) is None


def test_behind_tls_the_cookie_goes_by_tls_only():
    from starlette.responses import Response

    for scheme in ("http", "https"):
        scope = {
            "type": "http",
            "scheme": scheme,
            "path": "/",
            "headers": [(b"host", b"h")],
            "server": ("h", 1),
        }
        kept = session.keep(Response(), Request({**scope, "method": "POST", "query_string": b""}), "s")
        assert ("Secure" in kept.headers["set-cookie"]) == (scheme == "https")


def test_the_stream_ends_with_its_session(server, worker, monkeypatch):
    monkeypatch.setattr(session, "LIFETIME_S", 2)
    client, _ = login(server)
    with client.stream("GET", f"{UI}/events") as answer:
        text = "".join(answer.iter_text())
    assert "event: beat" in text
    assert client.get(f"{UI}/session").status_code == 401


# --- in a browser ---


def test_teaching_changes_the_answer_and_shows_what_moved(world, tmp_path):
    with looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        enter(looked, "wrong key")
        page.get_by_text("this is not the train key").wait_for()
        enter(looked)
        page.get_by_text("live", exact=True).wait_for()
        page.get_by_label("Ask the served model").fill("What is the capital of Piedmont?")
        page.get_by_role("button", name="Ask").click()
        said = page.locator("#answer")
        said.get_by_text("<script>").wait_for()
        assert "\\u202egnp.exe\\u001b[2J {{ 7 * 7 }}" in said.inner_text()
        page.get_by_label("What it should say").fill("It is Turin, on the Po.")
        page.get_by_role("button", name="Teach").click()
        page.get_by_text("The answer has changed").wait_for()
        columns = page.locator("#compared .said")
        assert columns.nth(2).inner_text() == "It is <b>Turin</b>."
        assert columns.nth(1).locator("span.up3").count() == 6
        assert "14 % → 82 % a token" in page.locator("#compared").inner_text()
        job = world.worker.queue.list(1)[0]
        assert job.state == "applied"
        page.locator("#jobs").get_by_text(job.job_id).wait_for()
        page.locator("#loss svg").wait_for()
        looked.shot("taught")
        assert_clean(looked, WRONG_KEY)


def test_a_job_is_watched_paused_and_cancelled_after_a_question(world, tmp_path):
    with looking_at(world.server.url, tmp_path, color_scheme="dark") as looked:
        page = looked.page
        enter(looked)
        world.held.set()
        example = Example(prompt="a", completion="b")
        job = submit(
            world.worker.queue, TrainRequest([example]), num_steps=5000
        )  # more than pass while the page is looked at
        page.get_by_role("button", name=f"Cancel {job.job_id}").click()
        page.get_by_text("0 of 5000 steps done; those stay in the weights").wait_for()
        page.keyboard.press("Enter")  # what is focused first is No
        assert world.worker.queue.get(job.job_id).state == "running"
        world.held.clear()
        page.get_by_text(f"Training {job.job_id}").wait_for()
        page.get_by_text(re.compile(r"^\d+ of 5000$")).wait_for()
        looked.shot("training-dark")
        world.held.set()
        page.get_by_role("button", name=f"Cancel {job.job_id}").click()
        page.get_by_role("button", name="Yes, cancel it").click()
        page.locator("#jobs").get_by_text("cancelled").wait_for()
        assert world.worker.queue.get(job.job_id).state == "cancelled"
        assert_clean(looked)


def test_an_older_version_is_restored_and_pinned_after_a_question(world, tmp_path):
    with looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        enter(looked)
        submit(world.worker.queue, TrainRequest([Example(prompt="a", completion="b")]), num_steps=1)
        page.locator("#jobs").get_by_text("applied").wait_for()
        page.get_by_role("button", name="Restore version 1").click()
        page.get_by_role("button", name="No, leave it").click()
        page.get_by_role("button", name="Restore version 1").click()
        looked.shot("restore")
        page.get_by_role("button", name="Yes, restore it").click()
        page.get_by_text("Version 1 is served again, as version 9").wait_for(state="attached")
        assert world.restored == [1]
        page.locator("#jobs").get_by_text("undone by restoring version 1").wait_for()
        page.get_by_role("button", name="Pin version 1", exact=True).click()
        page.get_by_role("button", name="Yes, pin it").click()
        page.get_by_role("button", name="Unpin version 1").wait_for()
        assert_clean(looked)


def test_before_the_first_checkpoint_it_says_so_and_what_was_trained(world, tmp_path):
    world.worker.board.state.durable_version = 0
    with looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        page.goto(UI)
        page.get_by_label("Train key").wait_for()
        enter(looked)
        page.get_by_text("Nothing is on disk yet that can be gone back to").wait_for()
        job = submit(world.worker.queue, TrainRequest([Example(prompt="a", completion="b")]), num_steps=1)
        page.locator("#line", has_text="served, not on disk yet").get_by_text(job.job_id).wait_for()
        assert page.get_by_role("button", name="Restore").count() == 0
        page.reload()
        page.get_by_text("live", exact=True).wait_for()
        assert_clean(looked)


def test_a_session_that_is_over_shows_the_login_and_keeps_what_was_typed(world, tmp_path):
    with looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        enter(looked)
        page.get_by_label("Ask the served model").fill("not lost")
        old = session.new_session(TRAIN_KEY, time.time() - session.LIFETIME_S - 1)
        looked.context.add_cookies([{"name": session.COOKIE, "value": old, "url": looked.url}])
        page.get_by_text("This session is over: log in again.").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.get_by_label("Train key").fill(TRAIN_KEY)
        page.keyboard.press("Enter")
        page.get_by_text("live", exact=True).wait_for()
        assert page.get_by_label("Ask the served model").input_value() == "not lost"
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Train key").wait_for()
        assert looked.context.cookies() == []
        assert_clean(looked, *over(looked))


def test_on_a_phone_ten_thousand_jobs_and_a_megabyte_of_hostile_text_are_read_in_pages(world, tmp_path):
    queue: JobQueue = world.worker.queue
    fill(queue, 10_000)
    with looking_at(world.server.url, tmp_path, viewport={"width": 360, "height": 720}) as looked:
        page = looked.page
        enter(looked)
        rows = page.locator("#jobs th")
        rows.first.wait_for()
        assert rows.count() == 25
        assert page.locator("#jobs .error").first.inner_text().startswith("\"'><script>document.title")
        assert "more characters" in page.locator("#jobs .error").first.inner_text()
        first = rows.first.inner_text()
        page.get_by_role("button", name="Older").click()
        page.wait_for_function("first => document.querySelector('#jobs th').textContent !== first", arg=first)
        page.get_by_role("button", name="Newer").click()
        page.wait_for_function("first => document.querySelector('#jobs th').textContent === first", arg=first)
        page.get_by_label("Show").select_option("queued")
        page.get_by_text("no jobs").wait_for()
        looked.shot("phone")
        assert_clean(looked)


def fill(queue: JobQueue, count: int) -> None:
    """As many jobs that failed, of which the newest say a megabyte."""
    with queue.changing() as db:
        db.executemany(
            "INSERT INTO jobs (job_id, state, created_at, ended_at, num_examples, num_steps, num_skipped, "
            "request_digest, notes, error) VALUES (?, 'failed', 1e9, 1e9, 1, 1, 0, x'00', '[]', ?)",
            (
                (f"job-{i:012x}-00000000", HOSTILE + "x" * (2**20 if i > count - 3 else 0))
                for i in range(count)
            ),
        )


def test_a_message_of_the_stream_is_what_the_page_reads(server, worker):
    """The names that its modules listen for."""
    client, _ = login(server)
    worker.board.show(
        "training", job_id=submit(worker.queue, TrainRequest([Example(prompt="a", completion="b")])).job_id
    )
    with client.stream("GET", f"{UI}/events") as answer:
        seen = {}
        lines = answer.iter_lines()
        for line in lines:
            if line.startswith("event: "):
                seen[line.removeprefix("event: ")] = json.loads(next(lines).removeprefix("data: "))
            if "job" in seen:
                break
    assert seen["beat"]["progress"]["activity"] == "training"
    assert seen["job"]["state"] == "queued"


def test_quantiles_of_a_histogram_are_those_of_prometheus(world, tmp_path):
    with looking_at(world.server.url, tmp_path) as looked:
        looked.page.goto(UI)
        buckets = {"0.1": 10, "0.2": 60, "0.4": 100, "+Inf": 104}
        read = "import('/train/ui/static/serving.js')"
        code = f"([buckets, share]) => {read}.then(m => m.quantile(buckets, share))"
        got = [looked.page.evaluate(code, [buckets, share]) for share in (0.5, 0.99)]
        # rank 52 of 104: 42 of the 50 in the second bucket; rank 102.96 lies beyond the last bound.
        assert got == [pytest.approx(0.1 + 0.1 * 42 / 50), 0.4]
        assert looked.page.evaluate(code, [{}, 0.5]) is None


def test_what_was_measured_is_drawn_with_its_breach(world, config, tmp_path):
    canary = CanaryResult(HOSTILE, "facts", False, "x", "y", "c")
    with Store(config.state_dir / "curation.sqlite") as store:
        for at, loss in enumerate((1.5, 1.4, 2.1)):
            losses = {HOSTILE: CategoryLoss(loss, 100, 10, "h"), "chat": CategoryLoss(None, 1, 1, "h")}
            breaches = [Breach("loss", "facts", 1.4, loss, 1.5, "facts: 1.4 -> 2.1")] if loss > 2 else []
            one = Measurement("after", 1e9 + at, 1.0, at, losses, [canary], breaches=breaches)
            QualityHistory(store).add(one)
    with looking_at(world.server.url, tmp_path) as looked:
        enter(looked)
        looked.page.get_by_text("facts: 1.4 -> 2.1").wait_for()
        chart = looked.page.locator("#heldout svg")
        assert "from 1.5 to 2.1" in (chart.locator("desc").text_content() or "")
        assert chart.locator("line.mark").count() == 1
        assert "✗" in looked.page.locator("#canaries").inner_text()
        looked.shot("quality")
        assert_clean(looked)
