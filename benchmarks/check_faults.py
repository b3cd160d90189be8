"""Plants stale and wrong tensors in a model that real vLLM serves, and counts which `apollo-ipc check` finds.

    python benchmarks/check_faults.py MODEL_DIR [--clean 4] [--json FILE] [VLLM_FLAGS ...]

MODEL_DIR is only read. Every weight is changed in place first, as `check` does; a fault then gives vLLM's
memory of one tensor other values than the worker's model has. Clean comparisons of other prompts tell what
would be refused wrongly.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from apollo_worker.commands.agreement import MOST, MOST_SCRAMBLED, Agreement, agreement, judge
from apollo_worker.commands.check_prompts import random_prompts, text_prompts
from apollo_worker.model.hf_model import vocab_size_of
from apollo_worker.model.live_model import attach
from apollo_worker.model.scramble import scramble
from apollo_worker.step.forward_fp32 import logprobs_in_fp32
from apollo_worker.step.step import Trainer
from torch import Tensor

from apollo_ipc.config import Train
from apollo_ipc.manifest import read_manifest
from apollo_ipc.process.serving import VllmServer, prompt_logprobs

Served = Callable[[Tensor], Tensor]  # (B, S) prompts -> (B, S - 1) log-probabilities of the server
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


class Finding(NamedTuple):
    """What `check` makes of one fault, or of none. before: as it comes, nothing changed in place yet."""

    name: str
    is_fault: bool
    found: Agreement
    reasons: list[str]

    @property
    def is_wrong(self) -> bool:
        return self.is_fault != bool(self.reasons)

    def times_floor(self, figure: str) -> float:
        return getattr(self.found.served, figure) / getattr(self.found.floor, figure)


def look(
    trainer: Trainer,
    served: Served,
    shared: Mapping[str, Tensor],
    texts: Tensor,
    num_clean: int,
    dtype: str = "bfloat16",
) -> Iterator[Finding]:
    """Clean comparisons, before and after a change in place, then one for each fault.

    shared: checkpoint name -> the memory that the server reads, the worker's own or another's with the same
    values. texts: (B, S).
    """
    prompts = [
        torch.cat([texts, random_prompts(vocab_size_of(trainer.live.model), seed)])
        for seed in range(num_clean)
    ]
    for i, some in enumerate(prompts):
        found = agreement(served(some), *_own(trainer, some))
        yield Finding(f"clean, set {i}", False, found, judge(found, dtype, MOST))
    before = {name: tensor.detach().clone() for name, tensor in shared.items()}
    scramble(shared)
    _part(trainer, shared)
    own = [_own(trainer, some) for some in prompts]
    for i, some in enumerate(prompts):
        found = agreement(served(some), *own[i])
        yield Finding(f"clean, scrambled, set {i}", False, found, judge(found, dtype, MOST_SCRAMBLED))
    for name, plant in stale_or_wrong(shared, before):
        with plant:
            found = agreement(served(prompts[0]), *own[0])
        yield Finding(name, True, found, judge(found, dtype, MOST_SCRAMBLED))
    for name, plant in wrong_rope(trainer.live.model):
        with plant:
            found = agreement(served(prompts[0]), *_own(trainer, prompts[0]))
        yield Finding(name, True, found, judge(found, dtype, MOST_SCRAMBLED))


def _own(trainer: Trainer, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """(the worker's own forward pass, the fp32 one)."""
    own = torch.stack([trainer.logprobs(row) for row in prompts.tolist()])
    return own, logprobs_in_fp32(trainer.live.model, trainer.head, prompts)


@torch.no_grad()
def _part(trainer: Trainer, shared: Mapping[str, Tensor]) -> None:
    """The worker's model keeps the values of `shared` in memory of its own: what is then done to `shared` is
    done to the server alone."""
    live = trainer.live
    for name, checkpoint_name in live.names.items():
        live.model.get_parameter(name).data = shared[checkpoint_name].detach().clone()
    for name, parts in live.parts.items():
        parameter = live.model.get_parameter(name)
        copy, start = parameter.detach().clone(), parameter.storage_offset()
        for part in parts:
            was = live.tensors[part]
            place = copy.as_strided(was.shape, was.stride(), was.storage_offset() - start)
            place.copy_(shared[part])
        parameter.data = copy


def stale_or_wrong(
    shared: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Each tensor of the first, the middle and the last layer, and those outside of layers, as it was before;
    then tensors at the place of others, in parts and by single experts."""
    names = _distinct(shared)
    layers = sorted({int(hit[1]) for name in names if (hit := _LAYER.search(name))})
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]}
    for name in names:
        hit = _LAYER.search(name)
        if hit is None or int(hit[1]) in chosen:
            yield f"stale {name}", _planted(shared[name], before[name])
    last = layers[-1]
    for name in names:
        if f".{last}." not in name or shared[name].dim() == 1:
            continue
        tensor, old = shared[name], before[name]
        other = _LAYER.sub(lambda hit: hit[0].replace(hit[1], str(layers[0])), name)
        if other in shared and shared[other].shape == tensor.shape:
            yield f"{name}: of layer {layers[0]}", _planted(tensor, shared[other].clone())
        if tensor.dim() == 2:
            half = len(tensor) // 2
            yield f"{name}: half of it stale", _planted(tensor[:half], old[:half])
            yield f"{name}: rows moved by a quarter", _planted(tensor, tensor.roll(len(tensor) // 4, 0))
        else:
            yield f"{name}: one of {len(tensor)} stale", _planted(tensor[-1], old[-1])


def wrong_rope(model: Any) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """In the worker's model, which is the same as in the server's."""
    for name, buffer in list(model.named_buffers()):
        if name.endswith("rotary_emb.inv_freq"):
            steps = torch.arange(len(buffer), device=buffer.device) / len(buffer)
            yield f"{name}: theta a hundred times as large", _planted(buffer, buffer * 100.0**-steps)
            yield f"{name}: positions half as far apart", _planted(buffer, buffer / 2)


def _distinct(tensors: Mapping[str, Tensor]) -> list[str]:
    """Of tied names the first."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        seen.setdefault(tensor.data_ptr(), name)
    return list(seen.values())


@contextmanager
def _planted(tensor: Tensor, values: Tensor) -> Iterator[None]:
    right, values = tensor.detach().clone(), values.clone()
    with torch.no_grad():
        tensor.copy_(values)
        try:
            yield
        finally:
            tensor.copy_(right)


def look_at_vllm(
    model_dir: Path, num_clean: int, flags: list[str], log_file: Path | None = None
) -> list[Finding]:
    """`look` with real vLLM as the server. Raises ApolloError where it does not start."""
    flags = ["--no-enable-prefix-caching", "--enforce-eager", *flags]
    with (
        tempfile.TemporaryDirectory(prefix="apollo-faults-") as base,
        VllmServer(model_dir, Path(base), flags, log_file=log_file) as server,
    ):
        manifest = read_manifest(server.runtime_dir)
        assert manifest is not None, server.log_tail()
        live = attach(manifest, verify=True)

        def served(prompts: Tensor) -> Tensor:
            return torch.tensor(
                [prompt_logprobs(server.url, server.model_name, row) for row in prompts.tolist()]
            )

        shared = live.trained_tensors()
        found = list(
            look(Trainer(live, Train()), served, shared, text_prompts(server), num_clean, manifest.dtype)
        )
        live.close()
        return found


def main(argv: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--clean", type=int, default=4, help="sets of prompts without a fault (%(default)s)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    args, flags = parser.parse_known_args(argv)
    findings = look_at_vllm(args.model_dir, args.clean, flags)
    for one in findings:
        figures = "  ".join(
            f"{name} {getattr(one.found.served, name):.4f} ({one.times_floor(name):.2f}x)"
            for name in ("mean", "p90", "p99", "max")
        )
        print(f"{one.name:58} {figures}  {'refused' if one.reasons else 'accepted'}")
    print(summary(findings))
    if args.json:
        rows = [one._asdict() for one in findings]
        args.json.write_text(json.dumps(msgspec.to_builtins(rows), indent=2) + "\n")
    return int(any(one.is_wrong for one in findings))


def summary(findings: list[Finding]) -> str:
    faults = [one for one in findings if one.is_fault]
    clean = [one for one in findings if not one.is_fault]
    nearest = min(faults, key=lambda one: one.times_floor("mean"))
    worst = max(clean, key=lambda one: one.times_floor("mean"))
    worst_times = worst.times_floor("mean")
    return (
        f"{len(faults)} faults, {sum(one.is_wrong for one in faults)} missed; {len(clean)} clean, "
        f"{sum(one.is_wrong for one in clean)} refused. Nearest fault: {nearest.name}, mean "
        f"{nearest.times_floor('mean'):.2f} times the floor's; worst clean one {worst_times:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
