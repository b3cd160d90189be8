"""What the page shows of `plan`: the served model's, made once, with what is wrong said."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace

import msgspec
import pytest
from apollo_router.ui import forecast as forecast_module
from apollo_router.ui.forecast import Forecast
from router_harness import TRAIN_KEY, make_config
from served_model import Exporter, make_tiny_model

from apollo_ipc import memory_plan
from apollo_ipc.errors import ApolloError, NotReady


@pytest.fixture
def gateway(tmp_path):
    config = make_config()
    with Exporter(make_tiny_model(tmp_path / "model"), config.runtime_dir) as exporter:
        yield SimpleNamespace(config=config, exporter=exporter)


def test_the_plan_is_that_of_the_command_line(gateway, monkeypatch):
    commands = []
    monkeypatch.setattr(
        forecast_module,
        "plan_command",
        lambda request: commands.append(request) or memory_plan.plan_command(request),
    )

    async def main():
        forecast = Forecast()
        return await asyncio.gather(forecast.get(gateway), forecast.get(gateway))

    first, second = asyncio.run(main())
    assert first is second
    assert len(commands) == 1, "two that ask at once wait for one"
    assert first.model == gateway.exporter.manifest.model_path
    assert first.trainer_bytes == sum(item.bytes for item in first.trainer) > 0
    assert commands[0]["options"] == gateway.config.train


def test_a_plan_that_fails_says_why_and_is_asked_for_again(gateway, monkeypatch):
    told = {"error": {"message": "no such model", "code": "attach_failed"}}
    code = f"import sys; print({json.dumps(told)!r}); sys.exit(3)"
    monkeypatch.setattr(forecast_module, "plan_command", lambda _: [sys.executable, "-c", code])
    forecast = Forecast()
    for _ in range(2):
        with pytest.raises(ApolloError, match="no such model"):
            asyncio.run(forecast.get(gateway))


def test_without_weights_there_is_nothing_to_plan():
    gateway = SimpleNamespace(config=make_config())
    with pytest.raises(NotReady, match="not shared its weights"):
        asyncio.run(Forecast().get(gateway))


def test_the_route_wants_the_key_and_answers_with_the_whole_plan(server, monkeypatch):
    plan = memory_plan.MemoryPlan(
        "m", "bfloat16", 1, "d", 2, 0.9, [], [memory_plan.Item("state", 7)], [], 1, 7, 8, True, None, []
    )

    async def get(self, gateway):
        return plan

    monkeypatch.setattr(Forecast, "get", get)
    assert server.client(None).get("/train/ui/plan").status_code == 401
    answer = server.client(TRAIN_KEY).get("/train/ui/plan")
    assert msgspec.convert(answer.json(), memory_plan.MemoryPlan) == plan
