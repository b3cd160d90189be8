"""The page: what is on it, and the commands that make it."""

from __future__ import annotations

import math
import os
import re
import sys
from xml.etree import ElementTree

import msgspec
from quality_page import HOSTILE, Parsed, add_batch, fill, measured

from apollo_curation.quality.canaries import CanaryResult
from apollo_curation.quality.charts import Series, line_chart, thin
from apollo_curation.quality.history import Breach, QualityHistory
from apollo_curation.quality.report import clean, write_html
from apollo_curation.store import Store, store_path


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
    history = QualityHistory(store)
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
    history = QualityHistory(store)
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
