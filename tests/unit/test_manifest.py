"""The manifest of the weights: files that must not be read, and contents that must not be believed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import msgspec
import pytest
from apollo_worker.model.live_model import attach
from apollo_worker.model.mapping import SharedMemoryTransport, map_views, open_transport
from served_model import Exporter, make_tiny_model, mapped_weights

from apollo_ipc.errors import AttachError
from apollo_ipc.manifest import Refusal, manifest_path, read_manifest, write_manifest

K = "model.layers.0.self_attn.k_proj.weight"
QKV = "model/layers/0/self_attn/qkv_proj/weight"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served(model_dir, tmp_path):
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    before = mapped_weights()
    with Exporter(model_dir, runtime_dir) as exporter:
        yield exporter
    assert mapped_weights() == before


def changed_view(manifest, name, **changes):
    view = msgspec.structs.replace(manifest.views[name], **changes)
    return msgspec.structs.replace(manifest, views={**manifest.views, name: view})


def changed_tensor(manifest, name, **changes):
    tensor = msgspec.structs.replace(manifest.tensors[name], **changes)
    return msgspec.structs.replace(manifest, tensors={**manifest.tensors, name: tensor})


# --- manifests that must not be believed ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: changed_view(m, K, offset=m.views[K].offset + 10**6), "reaches outside model/layers/0"),
        (lambda m: changed_view(m, K, shape=[10**6, 64]), "reaches outside model/layers/0"),
        (lambda m: changed_view(m, K, stride=[64, 10**6]), "reaches outside model/layers/0"),
        (lambda m: changed_view(m, K, stride=[-64, 1]), "contradict each other or are negative"),
        (lambda m: changed_view(m, K, stride=[0, 1]), "contradict each other or are negative"),
        (lambda m: changed_view(m, K, stride=[1]), "contradict each other or are negative"),
        (lambda m: changed_view(m, K, shape=[-1, 64]), "contradict each other or are negative"),
        (lambda m: changed_view(m, K, offset=-1), "offset negative"),
        (lambda m: changed_tensor(m, QKV, offset_bytes=m.segments[0].size_bytes - 2), "outside its segment"),
        (lambda m: changed_tensor(m, QKV, shape=[2**40, 64]), "outside its segment"),
        (lambda m: changed_tensor(m, QKV, offset_bytes=-2), "offset negative"),
        (lambda m: changed_tensor(m, QKV, offset_bytes=1), "not aligned to bfloat16"),
        (lambda m: changed_tensor(m, QKV, segment=1), "segment 1 of 1"),
        (lambda m: changed_tensor(m, QKV, segment=-1), "segment -1 of 1"),
        (lambda m: changed_tensor(m, QKV, dtype="int8"), "dtype int8 cannot be trained"),
        (lambda m: changed_tensor(m, QKV, dtype="load"), "dtype load cannot be trained"),
        (lambda m: changed_view(m, K, tensor="nowhere"), "no tensor 'nowhere'"),
    ],
)
def test_a_view_that_is_not_inside_its_memory_is_refused_by_name(served, change, message):
    with pytest.raises(AttachError, match=message) as caught:
        map_views(change(served.manifest), SharedMemoryTransport())
    assert any(name.startswith(("model.layers.0.self_attn",)) for name in caught.value.refused)
    del caught


def test_a_segment_larger_than_its_file_is_refused(served):
    manifest = served.manifest
    too_big = msgspec.structs.replace(manifest.segments[0], size_bytes=manifest.segments[0].size_bytes + 1)
    with pytest.raises(AttachError, match="the manifest says"):
        map_views(msgspec.structs.replace(manifest, segments=[too_big]), SharedMemoryTransport())


def test_an_unknown_transport_is_refused(served):
    with pytest.raises(AttachError, match="'carrier-pigeon' is not known"):
        open_transport(msgspec.structs.replace(served.manifest, transport="carrier-pigeon"))


def test_a_gpu_that_is_not_visible_is_refused_by_its_uuid(served):
    manifest = msgspec.structs.replace(served.manifest, transport="cuda_ipc", device_uuid="0badcafe")
    with pytest.raises(AttachError, match="vLLM's GPU 0badcafe is not visible here"):
        open_transport(manifest)


def test_a_blocking_refusal_stops_the_attach_with_its_reason(served):
    refusal = Refusal("--enable-sleep-mode", "its memory cannot be shared")
    with pytest.raises(AttachError, match="--enable-sleep-mode: its memory cannot be shared"):
        attach(msgspec.structs.replace(served.manifest, refused=[refusal]), verify=False)


def test_a_parameter_whose_memory_was_refused_is_named_with_that_reason(served):
    manifest = served.manifest
    tensors = {name: tensor for name, tensor in manifest.tensors.items() if name != QKV}
    refused = [Refusal(QKV, "offloaded to host memory", blocks=False)]
    with pytest.raises(AttachError) as caught:
        attach(msgspec.structs.replace(manifest, tensors=tensors, refused=refused), verify=False)
    assert f"{K}: offloaded to host memory" in caught.value.refused
    assert len(caught.value.refused) == 3  # q, k and v
    del caught
    assert not mapped_weights()


# --- the manifest file ---


@pytest.fixture
def manifest_file(served) -> Path:
    return manifest_path(served.runtime_dir)


def test_no_manifest_yet_is_none(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("mode", [0o666, 0o640, 0o604, 0o610])
def test_a_manifest_that_lets_others_in_is_refused(manifest_file, mode):
    manifest_file.chmod(mode)
    with pytest.raises(AttachError, match=f"mode {mode:04o} lets others in"):
        read_manifest(manifest_file.parent)


def test_a_manifest_of_another_user_is_refused(manifest_file, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(AttachError, match=f"owned by uid {owner}, expected {owner + 1}"):
        read_manifest(manifest_file.parent)


def test_a_symlink_to_a_manifest_is_refused(manifest_file):
    real = manifest_file.rename(manifest_file.with_name("real"))
    manifest_file.symlink_to(real)
    with pytest.raises(AttachError, match="symlink"):
        read_manifest(manifest_file.parent)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", pickle.dumps({"format": 1}), b"[" * 100_000, b"\xff" * 64],
    ids=["empty", "cut", "list", "no fields", "pickle", "deep", "bytes"],
)  # fmt: skip
def test_garbage_is_not_a_manifest(manifest_file, content):
    manifest_file.write_bytes(content)
    with pytest.raises(AttachError, match="not a weights manifest"):
        read_manifest(manifest_file.parent)


def test_a_manifest_of_another_format_is_refused(served):
    write_manifest(msgspec.structs.replace(served.manifest, format=99), served.runtime_dir)
    with pytest.raises(AttachError, match="format 99"):
        read_manifest(served.runtime_dir)
