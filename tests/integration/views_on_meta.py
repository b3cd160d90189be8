"""Run by test_views_27b.py in a process of its own: derives the views of a model whose tensors are empty.

    python views_on_meta.py CONFIG_DIR    prints {"parameters", "mapped", "refused", "merges"} as JSON

CONFIG_DIR holds a config.json only. vLLM's own model class is built on the meta device and its `load_weights`
replayed; the worker's model is built on the meta device too, so full-size shapes cost nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from apollo_router.views import derive_views, record_loading
from apollo_worker.model.hf_model import build_model, checkpoint_names, parameter_names
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model

from apollo_ipc.checkpoint.shards import ShardTensor


def main(config_dir: Path) -> dict:
    worker_model = build_model(config_dir, torch.bfloat16)
    checkpoint = {
        names[0]: ShardTensor(names[0], "model.safetensors", "BF16", list(parameter.shape), 0, 0)
        for names in parameter_names(worker_model).values()
        for parameter in [worker_model.get_parameter(names[0])]
    }
    arguments = EngineArgs(
        model=str(config_dir),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        dtype="bfloat16",
    )
    config = arguments.create_engine_config()
    with tempfile.NamedTemporaryFile() as store, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{store.name}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            model = initialize_model(config)
        recording = record_loading(model, checkpoint)
    views, refused = derive_views(recording, dict(model.named_parameters(remove_duplicate=False)))
    names, missing = checkpoint_names(worker_model, set(views))
    return {
        "parameters": len(names) + len(missing),
        "mapped": len(names),
        "missing": missing[:10],
        "refused": [[r.name, r.reason] for r in refused],
        "views": {name: [view.tensor, view.shape, view.offset] for name, view in views.items()},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
