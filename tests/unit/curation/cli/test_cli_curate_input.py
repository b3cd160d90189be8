"""`apollo-ipc curate strip`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from log_records import CHAT, write
from typer.testing import CliRunner

from apollo_curation.cli import curate_input, curate_status
from apollo_ipc.errors import UserError

app = typer.Typer()
app.command()(curate_input.strip)
app.command()(curate_status.status)


@pytest.fixture
def logs(tmp_path):
    chat = [{"role": "system", "content": "be terse and kind"}, *CHAT["messages"]]
    return write(tmp_path / "logs" / "log.jsonl", {"messages": chat}, b"{broken", CHAT).parent


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def test_what_is_there_is_counted_and_broken_records_are_named(logs):
    done = run("strip", logs)
    assert "2 conversations" in done.output
    assert f"{logs / 'log.jsonl'}:2: not JSON" in done.output
    answer = json.loads(run("strip", logs, "--json").stdout)
    assert (answer["broken"], answer["topics"]) == ({"not_json": 1}, {"log": 2})
    assert [one["reason"] for one in answer["examples"]] == ["not_json"]


def test_without_paths_and_sources_the_command_says_what_to_do(monkeypatch):
    monkeypatch.delenv("APOLLO_CONFIG", raising=False)
    done = run("strip")
    assert isinstance(done.exception, UserError)
    assert "sources" in done.exception.message


def test_the_strip_command_takes_its_sources_from_the_configuration_and_writes_what_is_left(logs, tmp_path):
    config = tmp_path / "apollo.toml"
    config.write_text(f'[curation]\nsources = ["{logs}"]\nstrip = [{{role = "system"}}]\n')
    out = tmp_path / "out.jsonl"
    done = run("strip", "--config", config, "--preview", "1", "--out", out)
    assert done.exit_code == 0, done.output
    assert "-be terse and kind" in done.output
    assert "2 conversations, 1 changed, 0 refused" in done.output
    assert "\x1b[" not in done.output
    assert [json.loads(line) for line in out.read_text().splitlines()] == [CHAT, CHAT]
    answer = json.loads(run("strip", "--config", config, "--json").stdout)
    assert answer["report"]["rules"][0]["num_tokens"] == 4
    assert answer["report"]["is_estimate"] is True
    assert answer["num_broken"] == 1


def test_the_strip_command_does_not_write_over_what_it_reads(logs):
    before = (logs / "log.jsonl").read_bytes()
    done = run("strip", logs, "--out", logs / "log.jsonl")
    assert isinstance(done.exception, UserError)
    assert (logs / "log.jsonl").read_bytes() == before


def test_reading_imports_nothing_heavy():
    code = "import sys, apollo_curation.logs.readers, apollo_curation.cli.curate_input; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "vllm"} & set(loaded.split())
