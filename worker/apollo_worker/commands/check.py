"""`apollo-ipc check MODEL_DIR`: can this model be trained live?

Serves the directory briefly with real vLLM, maps its weights, compares them with the checkpoint bit for bit,
and holds vLLM's log-probabilities and the worker's own against an fp32 forward pass: on the checkpoint as it
is, and again after every weight was changed in place. A copy that vLLM keeps somewhere would not follow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from apollo_ipc.checkpoint.shards import shard_index
from apollo_ipc.config import Train
from apollo_ipc.errors import ApolloError, AttachError
from apollo_ipc.manifest import read_ranks
from apollo_ipc.process.progress import Doing, progress, say_nothing
from apollo_ipc.process.serving import VllmServer, prompt_logprobs
from apollo_worker.commands.agreement import MOST, MOST_ROUTED, MOST_SCRAMBLED, Agreement, agreement, judge
from apollo_worker.commands.check_prompts import random_prompts, text_prompts
from apollo_worker.model.compare import compare
from apollo_worker.model.experts import routers
from apollo_worker.model.hf_model import build_model, checkpoint_names, parameter_names, vocab_size_of
from apollo_worker.model.host_buffer import DTYPES
from apollo_worker.model.live_model import LiveModel, attach
from apollo_worker.model.scramble import scramble
from apollo_worker.step.forward_fp32 import logprobs_in_fp32
from apollo_worker.step.step import Trainer


class CheckResult(msgspec.Struct):
    """What `--json` prints. refused: `name: reason`, empty when the model can be trained live.

    notes: what a user should know of one that can.
    """

    model: str
    parameters: int = 0
    mapped: int = 0
    equal_to_checkpoint: bool = False
    max_logprob_difference: float | None = None
    max_logprob_difference_after_change: float | None = None
    dtype: str | None = None
    refused: list[str] = []
    agreement: Agreement | None = None
    agreement_after_change: Agreement | None = None
    notes: list[str] = []

    @property
    def is_trainable(self) -> bool:
        return not self.refused and self.mapped == self.parameters > 0 and self.equal_to_checkpoint


def check(
    model_dir: Path,
    vllm_flags: list[str] | None = None,
    log_file: Path | None = None,
    doing: Doing = say_nothing,
) -> CheckResult:
    """Raises ApolloError only where nothing can be said (no such directory, vLLM does not start)."""
    flags = ["--no-enable-prefix-caching", "--enforce-eager", *(vllm_flags or [])]
    with (
        _vllm_log(log_file) as log,
        tempfile.TemporaryDirectory(prefix="apollo-check-") as base,
        VllmServer(model_dir, Path(base), flags, log_file=log) as server,
    ):
        return _check(model_dir, server, doing)


@contextlib.contextmanager
def _vllm_log(log_file: Path | None) -> Iterator[Path]:
    """The caller's file, or one that stays only where there is no verdict. The error then names it."""
    log = log_file or Path(tempfile.mkdtemp(prefix="apollo-check-")) / "vllm.log"
    is_kept = False
    try:
        yield log
    except ApolloError as error:
        if is_kept := log.exists():
            error.message += f"\nvLLM's log: {log}"
        raise
    finally:
        if log_file is None and not is_kept:
            shutil.rmtree(log.parent)


def _check(model_dir: Path, server: VllmServer, doing: Doing) -> CheckResult:
    doing("mapping the weights that vLLM serves")
    result = CheckResult(model=str(model_dir))
    ranks = read_ranks(server.runtime_dir)
    if not ranks:
        raise AttachError(f"vLLM serves the model, but shares no weights: {_why_no_manifest(server)}")
    result.dtype = ranks[0].dtype
    shared = {name for manifest in ranks for name in (*manifest.views, *manifest.pieces)}
    result.parameters, result.mapped = _count(model_dir, shared)
    try:
        live = attach(*ranks, verify=False)
    except AttachError as error:
        result.refused = error.refused or [error.message]
        return result
    result.mapped = live.num_parameters
    try:
        _compare(result, live, server, doing)
    finally:
        live.close()
    return result


def _why_no_manifest(server: VllmServer) -> str:
    """By what router/apollo_router/export.py logs."""
    lines = server.log_file.read_text(errors="replace").splitlines()
    reasons = [line.partition("CANNOT BE TRAINED: ")[2] for line in lines if "CANNOT BE TRAINED: " in line]
    return reasons[-1] if reasons else "is apollo-ipc installed in vLLM's environment?"


def _count(model_dir: Path, shared: set[str]) -> tuple[int, int]:
    """(parameters of the model, those of them that are one of the checkpoint's tensors that are shared)."""
    model = build_model(model_dir, torch.bfloat16)
    names, _ = checkpoint_names(model, shared)
    return len(parameter_names(model)), len(names)


def _compare(result: CheckResult, live: LiveModel, server: VllmServer, doing: Doing) -> None:
    doing("comparing them with the checkpoint, bit for bit")
    different = compare(live.model_dir, live.trained_tensors()).different
    result.equal_to_checkpoint = not different
    result.refused = [f"{name}: differs from the checkpoint" for name in different]
    result.notes = _rounded(live)
    trainer, dtype = Trainer(live, Train()), result.dtype or ""
    texts = text_prompts(server)
    if not len(texts):
        result.notes.append("vLLM serves without a tokenizer: only random token ids were asked")
    ids = random_prompts(vocab_size_of(live.model), seed=1)
    doing("asking vLLM, the worker and an fp32 forward pass")
    result.agreement = found = _measure(trainer, server, torch.cat([texts, ids]))
    result.max_logprob_difference = found.difference
    most = MOST_ROUTED if routers(live.model) else MOST
    reasons = [f"forward pass: {reason}" for reason in judge(found, dtype, most)]
    doing("the same after changing every weight in place")
    scramble(live.trained_tensors())
    ids = random_prompts(vocab_size_of(live.model), seed=2)
    result.agreement_after_change = found = _measure(trainer, server, torch.cat([texts, ids]))
    result.max_logprob_difference_after_change = found.difference
    if not reasons:
        reasons = [
            f"live weights: after a change in place {reason}: vLLM reads a copy of some of them"
            for reason in judge(found, dtype, MOST_SCRAMBLED)
        ]
    result.refused += reasons


def _rounded(live: LiveModel) -> list[str]:
    """A note where files hold more bits than are served (sync/writer.py says what becomes of them)."""
    index, tensors = shard_index(live.model_dir), live.trained_tensors()
    rounded = [
        name
        for name, tensor in tensors.items()
        if name in index and tensor.dtype.itemsize < DTYPES[index[name].dtype].itemsize
    ]
    if not rounded:
        return []
    stored, served = index[rounded[0]].dtype, tensors[rounded[0]].dtype
    return [
        f"{len(rounded)} tensors are {stored} on disk and served as {served}: equal after that cast. A sync "
        f"keeps the {stored} values of a tensor that training did not change, and writes one that it did "
        f"with the bits of {served}, as {stored}"
    ]


def _measure(trainer: Trainer, server: VllmServer, prompts: torch.Tensor) -> Agreement:
    """prompts: (B, S) int64."""
    rows = prompts.tolist()
    served = torch.tensor([prompt_logprobs(server.url, server.model_name, row) for row in rows])
    own = torch.stack([trainer.logprobs(row) for row in rows])
    with trainer.live.weights_of(trainer.head.layer if trainer.head else None):
        reference = logprobs_in_fp32(trainer.live.model, trainer.head, prompts)
    return agreement(served=served, own=own, reference=reference)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="apollo-ipc check", description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--log", type=Path, help="keep vLLM's log in this file")
    options, vllm_flags = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        # Libraries print progress; standard output is the answer's.
        with contextlib.redirect_stdout(sys.stderr), progress("starting vLLM") as doing:
            result = check(options.model_dir, vllm_flags, options.log, doing)
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
    for title, found in (
        ("log-probabilities against an fp32 forward pass", result.agreement),
        ("the same after changing every weight in place", result.agreement_after_change),
    ):
        table.add_row(title, "not measured" if found is None else _figures(found))
    for line in result.notes:
        table.add_row("[yellow]note", line)
    for line in result.refused:
        table.add_row("[red]refused", line)
    table.add_row("can be trained live", "[green]yes" if result.is_trainable else "[red]no")
    Console().print(table)


def _figures(found: Agreement) -> str:
    rows = [
        f"{who} {far.mean:.4f} nats off on average, {far.p99:.4f} at p99, {far.max:.4f} at most"
        for who, far in (("vLLM    ", found.served), ("worker  ", found.floor))
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
