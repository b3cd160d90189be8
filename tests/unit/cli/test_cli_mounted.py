"""Commands that an installed package mounts; what is wrong with the package costs no other command."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest
from typer.testing import CliRunner

from apollo_ipc.cli import main
from apollo_ipc.errors import ApolloError

RUNNER = CliRunner()


def mount(monkeypatch, **values: str) -> None:
    points = EntryPoints(EntryPoint(name, value, main.COMMAND_GROUP) for name, value in values.items())
    monkeypatch.setattr(main, "_mounted", lambda: points)


@pytest.mark.parametrize(
    "value", ["no_such_package:app", "apollo_curation.cli.curate:no_such_app", "nonsense"]
)
def test_a_broken_package_costs_only_its_own_commands(monkeypatch, value):
    mount(monkeypatch, broken=value, quality="apollo_curation.cli.quality:app")
    overview = RUNNER.invoke(main.app, ["--help"])
    assert overview.exit_code == 0
    assert "Not available" in overview.output
    assert RUNNER.invoke(main.app, ["quality", "check", "--help"]).exit_code == 0
    called = RUNNER.invoke(main.app, ["broken", "with", "--any=thing"])
    assert isinstance(called.exception, ApolloError)
    assert called.exception.message.startswith("`broken` is not available: ")


def test_curation_without_its_extra_says_how_to_install_it(monkeypatch):
    import importlib
    import importlib.util

    from apollo_curation import cli

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "click" else real(name))
    with pytest.raises(ImportError, match=r"click is not installed; `pip install 'apollo-ipc\[curation\]'`"):
        importlib.reload(cli)


def test_our_own_commands_come_from_no_package(monkeypatch):
    mount(monkeypatch, status="no_such_package:app")
    assert RUNNER.invoke(main.app, ["status", "--help"]).exit_code == 0
