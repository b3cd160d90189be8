"""What would be trained of a file, without a server."""

import json

import pytest
from apollo_worker.commands.preview import main
from chat_tokenizers import CHATML, VOCAB_SIZE, byte_tokenizer

from apollo_ipc.manifest import Serving


@pytest.fixture
def model_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("APOLLO_PATHS__RUNTIME_DIR", str(tmp_path / "runtime"))
    model = tmp_path / "model"
    byte_tokenizer(CHATML).save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE, "max_position_embeddings": 90}))
    return model


def shown(capsys, model_dir, lines):
    file = model_dir / "lines.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    status = main([str(model_dir), str(file)])
    return status, json.loads(capsys.readouterr().out)


def test_each_learned_turn_is_shown_behind_its_prompt(capsys, model_dir):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    status, entries = shown(
        capsys,
        model_dir,
        [
            {"messages": turns * 2},
            "",
            {"prompt": "x", "completion": "y"},
            {"context_ids": [1], "continuation_ids": [2]},
        ],
    )
    assert status == 0
    assert [(one["example"], one.get("message")) for one in entries] == [(0, 1), (0, 3), (1, None), (2, None)]
    first = entries[0]
    assert list(first) == ["example", "message", "context_ids", "target_ids", "context", "target"]
    assert first["context"] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert first["target"] == "b<|im_end|>"
    assert entries[1]["context"] == first["context"] + first["target"] + "\n" + first["context"]
    assert (entries[3]["context_ids"], entries[3]["target_ids"]) == ([1], [2])


def test_a_refused_example_is_one_entry_with_its_field_and_the_status_is_1(capsys, model_dir):
    turn = {"role": "assistant", "content": "b"}
    status, entries = shown(
        capsys,
        model_dir,
        [
            {"messages": [turn]},
            "no json",
            {"messages": [{**turn, "contents": 1}]},
            {"prompt": "x", "completion": "y"},
        ],
    )
    assert status == 1
    assert [one["example"] for one in entries] == [0, 1, 2, 3]
    assert [one["error"]["field"] for one in entries[:3]] == [
        "examples[0].messages[0]",
        "examples[1]",
        "examples[2].messages[0].contents",
    ]
    assert "target" in entries[3]


def test_the_vllm_that_serves_the_directory_says_how(capsys, model_dir, monkeypatch):
    served = type("M", (), {"model_path": str(model_dir), "serving": Serving(chat_template="X" + CHATML)})
    monkeypatch.setattr("apollo_worker.commands.preview.read_manifest", lambda runtime_dir: served)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, (entry,) = shown(capsys, model_dir, [{"messages": turns}])
    assert entry["context"].startswith("X<|im_start|>")
