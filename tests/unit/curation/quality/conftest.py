"""A history, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest
from quality_page import fill

from apollo_curation.quality.report import write_html
from apollo_curation.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "state" / "curation.sqlite") as store:
        yield store


@pytest.fixture
def page(store, tmp_path) -> Path:
    fill(store)
    write_html(tmp_path / "page.html", store)
    return tmp_path / "page.html"
