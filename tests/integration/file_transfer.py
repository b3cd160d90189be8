"""A backend of vLLM's weight transfer that runs on a CPU: a file in place of CUDA IPC, all else vLLM's own.

`register` is the plugin that vLLM's processes load; as a script it is the sender of gpu_transfer.py.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any


def register() -> None:
    """`vllm.general_plugins`. Idempotent, as vLLM loads plugins in every process."""
    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    @dataclasses.dataclass
    class FileUpdateInfo(WeightTransferUpdateInfo):
        names: list[str]
        dtype_names: list[str]
        shapes: list[list[int]]
        path: str

    class FileEngine(IPCWeightTransferEngine):
        """Start and finish of an update, with the layers' reload, are the IPC engine's."""

        update_info_cls: Any = FileUpdateInfo

        def update_weights(self, update_info: dict[str, Any]) -> None:
            """Without the wait for an accelerator."""
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Any) -> None:
            tensors = load_file(update_info.path)
            self.model.load_weights([(name, tensors[name]) for name in update_info.names])

    if "file" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("file", FileEngine)


def file_update_info(tensors: dict[str, Any]) -> dict[str, Any]:
    from gpu_transfer_sender import described  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file

    path = os.environ["FILE_TRANSFER"]
    save_file(tensors, path)
    return {**described(tensors), "path": path}


if __name__ == "__main__":
    from gpu_transfer_sender import serve  # pyright: ignore[reportMissingImports]

    serve("cpu", file_update_info, sys.argv[1:])
