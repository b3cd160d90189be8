"""`apollo-ipc check MODEL_DIR`: can this model be trained live?

Serves the directory briefly with real vLLM, maps its weights, compares them with the checkpoint bit for bit,
and compares the worker's own log-probabilities with vLLM's: on the checkpoint as it is, and again after every
weight was disturbed in place. A copy that vLLM keeps somewhere would not follow the second time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from pathlib import Path

import msgspec
import torch

from apollo_ipc.config import Train
from apollo_ipc.errors import ApolloError, AttachError
from apollo_ipc.manifest import read_manifest
from apollo_ipc.process.serving import VllmServer, prompt_logprobs
from apollo_worker.model.compare import compare
from apollo_worker.model.hf_model import build_model, checkpoint_names, parameter_names, vocab_size_of
from apollo_worker.model.live_model import LiveModel, attach
from apollo_worker.step.step import Trainer

NUM_PROMPTS = 3
PROMPT_TOKENS = 48
# One bf16 step is 2**-8 of a value (3.9e-3 for a log-probability of 1 nat, some 0.03 at 8 nats), and the two
# forward passes round at different places in each layer. Measured on the architectures of tests/integration:
# 0.01 to 0.05 in bf16. A wrong or stale tensor gives whole nats.
MAX_LOGPROB_DIFFERENCE = {"bfloat16": 0.15, "float16": 0.05, "float32": 0.01}
DISTURBANCE = 0.1  # of each tensor's standard deviation


class CheckResult(msgspec.Struct):
    """What `--json` prints. refused: `name: reason`, empty when the model can be trained live."""

    model: str
    parameters: int = 0
    mapped: int = 0
    equal_to_checkpoint: bool = False
    max_logprob_difference: float | None = None
    max_logprob_difference_after_change: float | None = None
    dtype: str | None = None
    refused: list[str] = []

    @property
    def is_trainable(self) -> bool:
        return not self.refused and self.mapped == self.parameters > 0 and self.equal_to_checkpoint


def check(model_dir: Path, vllm_flags: list[str] | None = None, log_file: Path | None = None) -> CheckResult:
    """Raises ApolloError only where nothing can be said (no such directory, vLLM does not start)."""
    result = CheckResult(model=str(model_dir))
    with tempfile.TemporaryDirectory(prefix="apollo-check-") as base:
        flags = ["--no-enable-prefix-caching", "--enforce-eager", *(vllm_flags or [])]
        with VllmServer(model_dir, Path(base), flags, log_file=log_file) as server:
            manifest = read_manifest(server.runtime_dir)
            if manifest is None:
                raise AttachError("vLLM started without our export; is apollo-ipc installed beside it?")
            result.dtype = manifest.dtype
            result.parameters, result.mapped = _count(model_dir, set(manifest.views))
            try:
                live = attach(manifest, verify=False)
            except AttachError as error:
                result.refused = error.refused or [error.message]
                return result
            try:
                _compare(result, live, server)
            finally:
                live.close()
    return result


def _count(model_dir: Path, views: set[str]) -> tuple[int, int]:
    """(parameters of the model, those of them that have a view)."""
    model = build_model(model_dir, torch.bfloat16)
    names, _ = checkpoint_names(model, views)
    return len(parameter_names(model)), len(names)


def _compare(result: CheckResult, live: LiveModel, server: VllmServer) -> None:
    different = compare(live.model_dir, live.trained_tensors()).different
    result.equal_to_checkpoint = not different
    result.refused = [f"{name}: differs from the checkpoint" for name in different]
    trainer = Trainer(live, Train())
    limit = MAX_LOGPROB_DIFFERENCE.get(result.dtype or "", 0.15)
    result.max_logprob_difference = _max_difference(trainer, server, seed=1)
    if not result.max_logprob_difference <= limit:
        result.refused.append(
            f"forward pass: log-probabilities differ by {result.max_logprob_difference:.3g} (limit {limit})"
        )
    _disturb(live)
    result.max_logprob_difference_after_change = _max_difference(trainer, server, seed=2)
    if result.max_logprob_difference <= limit < result.max_logprob_difference_after_change:
        result.refused.append(
            f"live weights: after a change in place log-probabilities differ by "
            f"{result.max_logprob_difference_after_change:.3g} (limit {limit}): vLLM reads a copy"
        )


def _max_difference(trainer: Trainer, server: VllmServer, seed: int) -> float:
    """Largest difference in nats over a few prompts of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = vocab_size_of(trainer.live.model)
    worst = 0.0
    for _ in range(NUM_PROMPTS):
        ids = torch.randint(0, vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
        served = torch.tensor(prompt_logprobs(server.url, server.model_name, ids))
        worst = max(worst, float((served - trainer.logprobs(ids)).abs().nan_to_num(float("inf")).max()))
    return worst


@torch.no_grad()
def _disturb(live: LiveModel) -> None:
    generator = torch.Generator().manual_seed(3)
    for tensor in live.trained_tensors().values():
        spread = tensor.float().std() if tensor.numel() > 1 else torch.zeros(())
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        tensor.copy_(tensor.float() + noise * DISTURBANCE * (spread + 1e-3))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="apollo-ipc check", description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--log", type=Path, help="keep vLLM's log in this file")
    options, vllm_flags = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        # Libraries print progress; standard output is the answer's.
        with contextlib.redirect_stdout(sys.stderr):
            result = check(options.model_dir, vllm_flags, options.log)
    except ApolloError as error:
        if options.json:
            print(json.dumps({"error": {"message": error.message, "code": error.code}}))
        else:
            print(f"apollo-ipc: {error.message}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(msgspec.json.encode(result).decode())
    else:
        _print(result)
    return 0 if result.is_trainable else 1


def _print(result: CheckResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.model} ({result.dtype})", show_header=False)
    table.add_row("parameters mapped", f"{result.mapped} of {result.parameters}")
    table.add_row("equal to the checkpoint", "yes, bit for bit" if result.equal_to_checkpoint else "no")
    for title, value in (
        ("largest difference to vLLM's log-probabilities", result.max_logprob_difference),
        ("the same after changing every weight in place", result.max_logprob_difference_after_change),
    ):
        table.add_row(title, "not measured" if value is None else f"{value:.4f} nats")
    for line in result.refused:
        table.add_row("[red]refused", line)
    table.add_row("can be trained live", "[green]yes" if result.is_trainable else "[red]no")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
