"""gpu_transfer.py without a server: what is asked of vLLM, in its own types, and what becomes figures."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import BENCHMARKS
from safetensors.torch import load_file
from served_model import make_tiny_model

from apollo_ipc.process.serving import serves_on_cpu

ORDER = ["/pause?mode=keep", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
# Where vLLM has the routes: 0.27 and later, 0.26.
ROUTERS = ("vllm.entrypoints.rl.online.api_router", "vllm.entrypoints.serve.dev.rlhf.api_router")


@pytest.fixture
def benchmark(monkeypatch):
    """A module of benchmarks/ by its name, imported as its script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class FakeVllm:
    """Answers 200, and 500 to what is in `broken`. asked: (path, body) in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.broken: set[str] = set()
        handler = type("Handler", (_Handler,), {"own": self})
        self._server = HTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeVllm:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


class _Handler(BaseHTTPRequestHandler):
    own: FakeVllm

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.own.asked.append((self.path, json.loads(body) if body else {}))
        is_broken = self.path in self.own.broken
        answer = b"no such weight: wrong.name" if is_broken else b"{}"
        self.send_response(500 if is_broken else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def vllm():
    with FakeVllm() as server:
        yield server


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_help_is_there_without_loading_torch():
    code = (
        f"import runpy, sys; sys.argv = ['gpu_transfer.py', '--help']\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        f"try: runpy.run_path({str(BENCHMARKS / 'gpu_transfer.py')!r}, run_name='__main__')\n"
        "except SystemExit: print('loaded', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    text, _, loaded = done.stdout.partition("loaded ")
    assert "--updates" in text
    assert loaded
    assert not set(loaded.split()) & {"torch", "transformers", "vllm", "numpy"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--updates", "0"], "at least one is needed"),
        (["--pause", "never"], "invalid choice"),
        (["--arch", "qwen3.5", "--preset", "8b"], "no qwen3.5 of 8b here"),
        (["--set", "pace=1"], "SECTION.KEY=VALUE is needed"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(benchmark, flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark("gpu_transfer").parse_arguments(flags)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow  # that of gpu_loop.py is not
def test_without_cuda_a_sentence_says_so_before_anything_is_made(tmp_path):
    if not serves_on_cpu():
        pytest.skip("this environment's vLLM is not the CPU build")
    command = [sys.executable, str(BENCHMARKS / "gpu_transfer.py"), "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "the peer needs a CUDA device" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


# --- the sender ---


def test_the_copy_is_the_checkpoint_and_shares_no_memory(benchmark, model_dir):
    sender = benchmark("gpu_transfer_sender")
    copy, stored = sender.load_copy(model_dir, "cpu"), load_file(model_dir / "model.safetensors")
    assert copy.keys() == stored.keys()
    assert all(torch.equal(copy[name], stored[name]) for name in stored)
    assert len({tensor.untyped_storage().data_ptr() for tensor in copy.values()}) == len(copy)


def ipc_info(benchmark, monkeypatch, tensors) -> dict:
    """What the sender makes of tensors, with the two calls that need a device replaced."""
    sender = benchmark("gpu_transfer_sender")
    monkeypatch.setattr(sender, "reduce_tensor", lambda tensor: (None, (tensor.numel(), "handle")))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="11-22"))
    return sender.ipc_update_info(tensors)


TENSORS = {"a.weight": torch.zeros(2, 3, dtype=torch.bfloat16), "a.A_log": torch.zeros(4)}


def test_the_body_of_an_update_is_what_the_installed_vllm_reads(benchmark, monkeypatch):
    engine = pytest.importorskip("vllm.distributed.weight_transfer.ipc_engine")
    body = json.loads(json.dumps(ipc_info(benchmark, monkeypatch, TENSORS)))
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    # parse_update_info is where 0.26 unpacks the handles, the dataclass where 0.32 does.
    parse = engine.IPCWeightTransferEngine.parse_update_info
    info = parse(SimpleNamespace(update_info_cls=engine.IPCWeightTransferUpdateInfo), body)
    assert (info.names, info.dtype_names) == (["a.weight", "a.A_log"], ["bfloat16", "float32"])
    assert info.shapes == [[2, 3], [4]]
    assert info.ipc_handles == [{"11-22": (6, "handle")}, {"11-22": (4, "handle")}]
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in info.dtype_names)


def test_the_server_has_to_allow_pickles_and_is_told_to(benchmark, monkeypatch, tmp_path):
    engine = pytest.importorskip("vllm.distributed.weight_transfer.ipc_engine")
    peers = benchmark("gpu_transfer_peer")
    monkeypatch.setattr(peers, "device_of", lambda: "cuda")
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda _: "0.32.0")
    peer = peers.ipc_peer(tmp_path)
    body = ipc_info(benchmark, monkeypatch, TENSORS)
    parse = engine.IPCWeightTransferEngine.parse_update_info
    with pytest.raises(ValueError, match="VLLM_ALLOW_INSECURE_SERIALIZATION"):
        parse(SimpleNamespace(update_info_cls=engine.IPCWeightTransferUpdateInfo), dict(body))
    for name, value in peer.env.items():
        monkeypatch.setenv(name, value)
    parse(SimpleNamespace(update_info_cls=engine.IPCWeightTransferUpdateInfo), dict(body))
    assert importlib.import_module("vllm.envs").VLLM_SERVER_DEV_MODE
    assert Path(peer.script).is_file()


def test_the_flag_is_the_installed_vllms(benchmark):
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    peers = benchmark("gpu_transfer_peer")
    parser = arg_utils.EngineArgs.add_cli_args(
        importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    )
    flags = peers.Peer("ipc", Path("sender.py")).flags
    assert parser.parse_args(flags).weight_transfer_config.backend == "ipc"


def test_every_route_that_is_asked_is_one_of_the_installed_vllm(benchmark, vllm):
    for name in ROUTERS:
        try:
            router = importlib.import_module(name).router
        except ImportError:
            continue
        known = {route.path for route in router.routes if "POST" in route.methods}
        transfer = benchmark("gpu_transfer_sender").Transfer(vllm.url, "keep", TENSORS, lambda _: {})
        transfer.begin()
        transfer.update()
        assert {path.partition("?")[0] for path in vllm.paths()} <= known
        return
    pytest.skip("no vLLM here")


def test_an_update_is_paused_sent_and_resumed_and_each_part_is_timed(benchmark, vllm):
    transfer = benchmark("gpu_transfer_sender").Transfer(vllm.url, "keep", TENSORS, lambda t: {"n": len(t)})
    transfer.begin()
    seconds = transfer.update()
    assert vllm.paths() == ["/init_weight_transfer_engine", *ORDER]
    assert dict(vllm.asked)["/update_weights"] == {"update_info": {"n": 2}}
    assert dict(vllm.asked)["/init_weight_transfer_engine"] == {"init_info": {}}
    parts = {"pause_s", "start_s", "describe_s", "update_s", "finish_s", "resume_s"}
    assert seconds.keys() == parts | {"held_s"}
    assert 0 < sum(seconds[part] for part in parts) <= seconds["held_s"]


# --- its process ---

SENDER = """
import sys
from gpu_transfer_sender import described, serve
serve("cpu", described, sys.argv[1:])
"""


@pytest.fixture
def start_sender(benchmark, tmp_path, model_dir, vllm):
    peers = benchmark("gpu_transfer_peer")
    script = tmp_path / "sender.py"
    script.write_text(SENDER)
    env = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    peer = peers.Peer("file", script)
    return lambda: peers.Sender(peer, model_dir, vllm.url, "keep", env, tmp_path / "sender.log")


def test_updates_go_on_beside_a_load_and_the_process_ends_with_its_block(benchmark, start_sender, vllm):
    peers = benchmark("gpu_transfer_peer")
    with start_sender() as sender:
        assert sender.copy["bytes"] > 0
        with peers.Updates(sender, 2, 0.3) as updates:
            pass
        assert len(updates.done) == 2, "all of them, though the block was over at once"
    assert vllm.paths() == ["/init_weight_transfer_engine", *ORDER, *ORDER]
    assert not Path(f"/proc/{sender.pid}").exists()


def test_an_update_that_vllm_refuses_is_quoted_and_serving_goes_on(benchmark, start_sender, vllm):
    peers = benchmark("gpu_transfer_peer")
    vllm.broken = {"/update_weights"}
    with (
        pytest.raises(peers.LoopFailed, match=r"(?s)POST /update_weights: 500 no such weight: wrong.name"),
        start_sender() as sender,
        peers.Updates(sender, 1, 0.1),
    ):
        pass
    assert vllm.paths()[-1] == "/resume", "requests must not wait for ever"
    assert not Path(f"/proc/{sender.pid}").exists()


# --- figures ---


def test_figures_of_updates_are_medians_and_the_longest_wait(benchmark):
    phases = benchmark("gpu_transfer_phases")
    updates = [{"update_s": s, "held_s": 2 * s} for s in (0.5, 0.25, 1.0)]
    assert phases.of_updates(updates, 10**9) == {
        "num_updates": 3, "update_s": 0.5, "held_s": 1.0, "held_max_s": 2.0, "bytes_per_s": 2e9,
    }  # fmt: skip


def test_a_copy_that_did_not_arrive_is_no_figure(benchmark):
    phases = benchmark("gpu_transfer_phases")
    phases.check_restored(-9.0, -2.0, -8.95)
    for restored in (-2.0, -7.0, -9.9):
        with pytest.raises(phases.LoopFailed, match="did not reach what is served"):
            phases.check_restored(-9.0, -2.0, restored)


def test_the_longest_wait_is_for_the_first_token_or_between_two(benchmark, monkeypatch):
    load = benchmark("gpu_loop_load")
    token, usage = (
        json.dumps({"choices": [{"text": "a"}]}),
        json.dumps({"choices": [], "usage": {"completion_tokens": 3}}),
    )
    for times, longest in (((1.0, 1.1, 1.2), 1.0), ((0.1, 0.2, 2.2), 2.0)):
        now = iter(times)
        monkeypatch.setattr(load.time, "perf_counter", lambda now=now: next(now))
        seen = load.Request(due_at=0.0)
        for text in (token, token, token, usage, "[DONE]"):
            load._read_line(f"data: {text}" if text != "[DONE]" else "data: [DONE]", seen)
        assert seen.longest_wait_s == pytest.approx(longest)
        assert load.summary([seen])["wait_max_s"] == pytest.approx(longest)


def test_vllms_share_leaves_room_for_the_copy(benchmark, monkeypatch):
    fit = benchmark("gpu_loop_fit")

    def planned(model_dir, utilization, env) -> dict:
        return {"utilization": round(utilization, 2), "fits": True, "max_utilization": 0.9,
                "device_bytes": 140 * 10**9, "device": "a GPU"}  # fmt: skip

    monkeypatch.setattr(fit, "_plan", planned)
    made, share = fit.plan(Path(), None, 0.6, {})
    assert share == 0.6
    made, share = fit.plan(Path(), None, 0.6, {}, beside_bytes=16 * 10**9)
    assert share == 0.6, "it fits as it is"
    made, share = fit.plan(Path(), None, 0.6, {}, beside_bytes=70 * 10**9)
    assert 140e9 * (1 - share) >= 72e9
    assert share > 0.45
    fit.check_memory(made, True, beside_bytes=70 * 10**9)
    made, share = fit.plan(Path(), 0.6, 0.6, {}, beside_bytes=70 * 10**9)
    assert share == 0.6, "what a person has said stays"
    with pytest.raises(fit.LoopFailed, match=r"a second copy of 70\.0 GB does not fit"):
        fit.check_memory(made, True, beside_bytes=70 * 10**9)


def test_an_older_vllm_imports_an_empty_ray_where_there_is_none(benchmark, monkeypatch, tmp_path):
    peers = benchmark("gpu_transfer_peer")
    monkeypatch.setattr(peers, "device_of", lambda: "cuda")
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda _: "0.32.0")
    assert "PYTHONPATH" not in peers.ipc_peer(tmp_path).env
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda _: "0.26.0")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    env = {**os.environ, **peers.ipc_peer(tmp_path).env}
    assert env["PYTHONPATH"].endswith(f"{os.pathsep}/somewhere/else")
    code = "import ray; print(hasattr(ray, 'is_initialized'))\nfrom ray.util import placement_group_table"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"
    assert "ModuleNotFoundError" in done.stderr, "what asks for more of ray than its name finds none"
