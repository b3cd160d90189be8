"""What the weights of a directory say: `python -m apollo_worker.commands.logprobs MODEL_DIR`.

Each line of its input is a JSON list of token ids; of each comes a line with log p of every token but the
first, given those before it. In host memory, whatever GPU there is, in idle priority. Ends with its input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from apollo_ipc.config import load_config
from apollo_ipc.cpu_products import convert_where_needed
from apollo_worker.jobs.example import Turn, sequence_of
from apollo_worker.model.live_model import load_offline
from apollo_worker.process import use_idle_priority
from apollo_worker.step.forward import Forward


def main(model_dir: Path) -> None:
    config = load_config()
    use_idle_priority(config)
    convert_where_needed()
    forward = Forward(load_offline(model_dir, torch.device("cpu")), config.train.logit_chunk_tokens)
    for line in sys.stdin:
        ids = json.loads(line)
        values = forward.logprobs(forward.read([sequence_of(ids, [Turn(0, len(ids))])]))
        print(json.dumps(values.tolist()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
