"""The documentation as a site: built without a warning, asking no other host; and its code can be read."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from urllib.parse import urlsplit

import msgspec
import pytest
from places import ROOT

from apollo_curation.quality.canaries import Canary
from apollo_curation.settings import CurationConfig
from apollo_ipc.config import load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"", "json", "python", "toml", "sh"}
BLOCKS = [
    pytest.param(language, code, id=f"{page.stem}-{i}-{language or 'plain'}")
    for page in PAGES
    for i, (language, code) in enumerate(re.findall(r"^```(\S*)\n(.*?)^```", page.read_text(), re.S | re.M))
]
# What a browser fetches by itself, in the markup that the site is made of.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*?\ssrc="([^"]+)"'
    r'|<link(?=[^>]*?rel="(?:stylesheet|icon|preload|preconnect)")[^>]*?\shref="([^"]+)"'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_site_has_every_page_and_every_link_of_it_leads_somewhere(site):
    """mkdocs says so, in its strict mode: of pages outside of the navigation and of links and anchors."""
    pages = {page.stem for page in PAGES if page.parent.name == "docs"}
    assert pages - {"index"} <= {page.parent.name for page in site.rglob("index.html")}
    assert (site / "index.html").exists()


def test_the_site_asks_no_other_host(site):
    fetched = {
        (file.name, url)
        for file in site.rglob("*.html")
        for found in FETCHED.findall(file.read_text())
        for url in found
        if url
    }
    assert len(fetched) > 3
    assert not {one for one in fetched if urlsplit(one[1]).netloc}


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_the_code_of_a_page_can_be_read_as_what_it_says_it_is(language, code):
    assert language in LANGUAGES
    if language == "python":
        ast.parse(code)
    elif language == "toml":
        check_toml(code)
    elif language == "json":
        # `...` stands for what is left out, and a page may show several objects, one after the other.
        text = re.sub(r",?\s*\.\.\.(?=\s*[}\]])", "", code)
        decoder = json.JSONDecoder()
        while text := text.strip():
            text = text[decoder.raw_decode(text)[1] :]
    elif language == "sh":
        done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr


def check_toml(code: str) -> None:
    """The configuration's, with every key and type; or a file of canaries."""
    sections = tomllib.loads(code)
    assert sections
    if "canary" in sections:
        msgspec.convert(sections["canary"], list[Canary])
        return
    overrides = {
        f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()
    }
    load_config(environ={}, overrides=overrides, kind=CurationConfig)
