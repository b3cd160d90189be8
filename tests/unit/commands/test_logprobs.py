"""What an older version of the weights says, read from its directory."""

from __future__ import annotations

import io
import json

import pytest
import torch
from apollo_worker.commands import logprobs
from apollo_worker.model.live_model import load_offline

from apollo_ipc.demo.models import make_model


def test_it_says_what_the_models_own_logits_say(tmp_path, monkeypatch, capsys):
    model_dir = make_model(tmp_path / "m", "qwen3", dtype=torch.float32, num_hidden_layers=2, hidden_size=64)
    asked = [[1, 5, 9, 200], [7, 8]]
    monkeypatch.setattr(logprobs, "use_idle_priority", lambda _: None)  # it would stay with this process
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{json.dumps(ids)}\n" for ids in asked)))
    logprobs.main(model_dir)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = load_offline(model_dir).model
    for ids, values in zip(asked, said, strict=True):
        whole = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = whole.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        # fp32 on both sides, logits of at most some units: a few times 2**-24 of them.
        assert values == pytest.approx(own.tolist(), abs=1e-5)
