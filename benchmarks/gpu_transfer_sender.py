"""A trainer's side of vLLM's weight transfer: a second copy of a checkpoint, sent whole at each `update`.

    python benchmarks/gpu_transfer_sender.py MODEL_DIR URL PAUSE

The requests are those of vLLM's HTTPVLLMWeightSyncClient (vllm/distributed/weight_transfer/clients.py), with
the pause that a caller puts around them; /pause also drops the prefix cache. Prints a line of JSON when the
copy is loaded, and one after each line of its input.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import safe_open
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from apollo_ipc.checkpoint.shards import shard_index

REQUEST_S = 600.0
Tensors = dict[str, Tensor]


def load_copy(model_dir: Path, device: str) -> Tensors:
    """Every tensor of the checkpoint, in the order of its files: layer by layer, as vLLM reloads."""
    tensors: Tensors = {}
    for name, where in shard_index(model_dir).items():
        with safe_open(model_dir / where.shard, "pt", device=device) as shard:
            tensors[name] = shard.get_tensor(name).clone()  # not a part of a whole file's allocation
    return tensors


def described(tensors: Tensors) -> dict[str, Any]:
    """What every dense backend is told of the tensors."""
    return {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


def ipc_update_info(tensors: Tensors) -> dict[str, Any]:
    """IPCWeightTransferUpdateInfo, not packed: one handle a tensor, by the UUID of the GPU that it is on."""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    handles = [{uuid: reduce_tensor(tensor)[1]} for tensor in tensors.values()]
    return described(tensors) | {"ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode()}


class Transfer:
    """Updates of one vLLM with one copy. make_info: the backend's `update_info`."""

    def __init__(
        self, url: str, pause: str, tensors: Tensors, make_info: Callable[[Tensors], dict[str, Any]]
    ):
        self._client = httpx.Client(base_url=url, timeout=REQUEST_S)
        self._pause, self._tensors, self._make_info = pause, tensors, make_info
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": {}})

    def update(self) -> dict[str, float]:
        """Seconds of each part. Raises httpx.HTTPStatusError; serving is resumed all the same."""
        self._seconds = {}
        started = time.perf_counter()
        try:
            with self._timed("pause_s"):
                self._post(f"/pause?mode={self._pause}")
            with self._timed("start_s"):
                self._post("/start_weight_update")
            with self._timed("describe_s"):
                info = self._make_info(self._tensors)
            with self._timed("update_s"):
                self._post("/update_weights", {"update_info": info})
            with self._timed("finish_s"):
                self._post("/finish_weight_update")
        finally:
            with self._timed("resume_s"):
                self._post("/resume")
        return {**self._seconds, "held_s": time.perf_counter() - started}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started

    def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        answer = self._client.post(path, json=body)
        if answer.is_error:
            print(f"POST {path}: {answer.status_code} {answer.text[:2000]}", file=sys.stderr, flush=True)
        answer.raise_for_status()


def serve(device: str, make_info: Callable[[Tensors], dict[str, Any]], arguments: list[str]) -> None:
    """arguments: MODEL_DIR URL PAUSE."""
    model_dir, url, pause = arguments
    started = time.perf_counter()
    tensors = load_copy(Path(model_dir), device)
    if device == "cuda":
        torch.cuda.synchronize()
    transfer = Transfer(url, pause, tensors, make_info)
    transfer.begin()
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    load_s = time.perf_counter() - started
    print(json.dumps({"num_tensors": len(tensors), "bytes": num_bytes, "load_s": load_s}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(transfer.update()), flush=True)
        if device == "cuda":
            torch.cuda.ipc_collect()  # what vLLM has let go of


if __name__ == "__main__":
    serve("cuda", ipc_update_info, sys.argv[1:])
