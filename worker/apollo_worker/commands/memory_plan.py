"""`apollo-ipc plan MODEL_DIR`: what training this model needs beside vLLM, from config.json alone.

Prints one JSON object: a MemoryPlan, or {"error": ...} with the exit status of wrong use.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_ipc import cpu_products
from apollo_ipc.config import Train
from apollo_ipc.errors import ApolloError, AttachError, UserError
from apollo_ipc.memory_plan import Item, MemoryPlan
from apollo_worker.commands.step_memory import StepSimulator
from apollo_worker.model.experts import expert_stacks
from apollo_worker.model.hf_model import read_model_config, vocab_size_of
from apollo_worker.optimizer.apollo import Apollo
from apollo_worker.optimizer.update import CPU_HELD_ELEMENTS, blocks
from apollo_worker.step.forward import read_head

CUDA_CONTEXT_BYTES = 500_000_000  # assumed: kernels and workspaces of torch; never counted by its allocator
# On a CPU: tensors between 1 and 32 MB come and go on malloc's heap, which keeps gaps. Of 177 MB at a step's
# peak it kept 15 %, of 526 MB 27 %; with M_MMAP_THRESHOLD at 128 KB none, in steps a fifth slower.
MALLOC_SHARE = 0.2
# Copies in fp32 that the plain update makes: of a block of the weight (value, change, noise, rounded); of a
# projected gradient, or under Adam of a whole one (R, m, v, mhat, vhat, U). A compiled one makes R alone.
_BLOCK_COPIES, _MOMENT_COPIES = 4, 6
_COMPILED = {True: ("apollo_worker.optimizer.gpu", "triton"), False: ("apollo_worker.optimizer.cpu", "numba")}


class Device(NamedTuple):
    name: str
    num_bytes: int
    is_gpu: bool


class Request(msgspec.Struct, frozen=True):
    """What the command line asks for. options: train.* with the flags in it; device_bytes: of one device,
    None for this machine's; num_ranks: processes of vLLM that share the model, a GPU each."""

    model_dir: str
    options: Train
    utilization: float
    device_bytes: int | None = None
    num_ranks: int = 1


def plan(request: Request) -> MemoryPlan:
    """Raises UserError for a directory whose model transformers does not know."""
    model_dir, options = Path(request.model_dir), request.options
    device = this_device() if request.device_bytes is None else Device("a GPU", request.device_bytes, True)
    try:
        config = read_model_config(model_dir)
        dtype, assumptions = served_dtype(config)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or options.max_tokens
        num_tokens = min(options.max_tokens, positions)
        of_product = None if device.is_gpu else cpu_products.extra_bytes
        step = StepSimulator(model_dir, dtype, num_tokens, options.logit_chunk_tokens, of_product)
    except AttachError as error:
        raise UserError(
            f"{error.message.splitlines()[0]}; give the directory of a causal language model that "
            "transformers knows",
            field="MODEL_DIR",
        ) from None
    if num_tokens < options.max_tokens:
        assumptions.append(f"the model has {num_tokens} positions: no longer example is trained")
    optimizer = make_meta_optimizer(step.model, options)
    adams = set(optimizer.fallbacks())
    temporaries = {
        id(p): temporary_bytes(p, None if name in adams else options.rank, device.is_gpu)
        for name, p in step.model.named_parameters()
    }
    held_elements = CPU_HELD_ELEMENTS if not device.is_gpu and has_compiled_update(is_gpu=False) else 0
    needs = {
        checkpointing: step.run(checkpointing, lambda p: temporaries[id(p)], held_elements)
        for checkpointing in (True, False)
    }
    chosen, other = options.activation_checkpointing, not options.activation_checkpointing
    head, largest = head_and_largest(step.model)
    num_trained = sum(p.nbytes for p in step.model.parameters())  # all of them are trained
    trainer = [
        Item("optimizer state", optimizer.state_size_bytes(), f"rank {options.rank}, {options.rounding}"),
        Item("one step, at its peak", needs[chosen].peak_bytes, "not the sum of its parts below"),
    ]
    if options.accumulate_steps > 1:
        note = f"of {options.accumulate_steps} examples, all parameters, fp32"
        num_bytes = 4 * sum(p.numel() for p in step.model.parameters())
        trainer.append(Item("gradients of accumulation", num_bytes, note))
    if request.num_ranks > 1:
        num_bytes = gathered_bytes(step.model, held_elements)
        trainer.append(Item("gathered weights", num_bytes, "a layer's or the head's, and those that wait"))
    if device.is_gpu:
        trainer.append(Item("CUDA context", CUDA_CONTEXT_BYTES, "assumed"))
    elif has_compiled_update(is_gpu=False):
        from apollo_worker.optimizer.cpu import kept_bytes

        projected = [p for name, p in step.model.named_parameters() if name not in adams]
        num_bytes = kept_bytes(projected, options.projection, options.rank)
        trainer.append(Item("projections", num_bytes, f"{options.projection}, kept by the compiled update"))
    if not device.is_gpu:
        if dtype == torch.bfloat16 and (num_bytes := cpu_products.kept_bytes()):
            trainer.append(Item("buffers for products", num_bytes, "blocks of bf16 as fp32"))
        num_bytes = int(MALLOC_SHARE * needs[chosen].peak_bytes)
        trainer.append(Item("gaps that malloc leaves", num_bytes, f"{MALLOC_SHARE:.0%} of a step, measured"))
    gradient_note = "the head's, and its fp32 sum for many targets" if head else "the largest single one"
    parts = [
        Item("activations", needs[chosen].activation_bytes, f"{num_tokens} tokens, {_word(chosen)}"),
        Item("activations otherwise", needs[other].activation_bytes, f"{_word(other)}: not counted"),
        Item("largest gradients at once", max(head, largest), gradient_note),
        Item("logits chunk", 2 * options.logit_chunk_tokens * vocab_size_of(step.model) * 4, "fp32, twice"),
        Item("update's temporaries", max(temporaries.values()), "the largest parameter's"),
    ]
    share = int(device.num_bytes * request.utilization)
    note = dtype_name(dtype)
    if request.num_ranks > 1 and device.is_gpu:
        num_trained = math.ceil(num_trained / request.num_ranks)
        note += f", one of {request.num_ranks} parts"
        assumptions.append(
            f"each of {request.num_ranks} GPUs holds an equal part of the weights; counted is the "
            "first, where the trainer is"
        )
    vllm = [
        Item("weights, served and trained", num_trained, note),
        Item("KV cache and vLLM's activations", max(0, share - num_trained), "what is left of its share"),
    ]
    vllm_bytes, trainer_bytes = sum(i.bytes for i in vllm), sum(i.bytes for i in trainer)
    largest_share = math.floor(100 * (device.num_bytes - trainer_bytes) / device.num_bytes) / 100
    return MemoryPlan(
        model=str(model_dir),
        dtype=dtype_name(dtype),
        num_parameters=sum(p.numel() for p in step.model.parameters()),
        device=device.name,
        device_bytes=device.num_bytes,
        utilization=request.utilization,
        vllm=vllm,
        trainer=trainer,
        step=parts,
        vllm_bytes=vllm_bytes,
        trainer_bytes=trainer_bytes,
        total_bytes=vllm_bytes + trainer_bytes,
        fits=vllm_bytes + trainer_bytes <= device.num_bytes and num_trained <= share,
        max_utilization=largest_share if largest_share * device.num_bytes > num_trained else None,
        assumptions=[*assumptions, *general_assumptions(step.model, device)],
    )


def this_device() -> Device:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, True)
    return Device(
        "this host, which has no GPU", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), False
    )


def served_dtype(config: PreTrainedConfig) -> tuple[torch.dtype, list[str]]:
    """What vLLM's `--dtype auto` makes of the configuration, and what has to be said of it."""
    dtype = config.get_text_config().dtype or config.dtype
    if dtype in (torch.bfloat16, torch.float16):
        return dtype, []
    named = f"config.json says {dtype_name(dtype)}" if dtype else "config.json names no dtype"
    return torch.bfloat16, [f"{named}: vLLM serves it in bfloat16 unless told otherwise"]


def make_meta_optimizer(model: PreTrainedModel, options: Train) -> Apollo:
    """The optimizer of shapes: its state takes no memory, and has the size of the real one."""
    named = [
        (name, torch.empty(p.shape, dtype=p.dtype, device="meta")) for name, p in model.named_parameters()
    ]
    stacks = expert_stacks(model)
    return Apollo(named, lr=options.lr, rank=options.rank, rounding=options.rounding, stacks=stacks)


def has_compiled_update(is_gpu: bool) -> bool:
    return all(importlib.util.find_spec(name) for name in _COMPILED[is_gpu])


def temporary_bytes(parameter: Tensor, rank: int | None, is_gpu: bool) -> int:
    """What the update of one parameter allocates for a moment. rank: None for Adam, never compiled."""
    if rank is not None and has_compiled_update(is_gpu):
        # R (c, r), on a GPU of all experts at once, on a CPU of one a thread; P (k, r) where it is not kept
        *experts, rows, cols = parameter.shape
        num_R = math.prod(experts) if is_gpu else min(math.prod(experts), torch.get_num_threads())
        return 4 * rank * (max(rows, cols) * num_R + (min(rows, cols) if is_gpu else 0))
    if rank is not None and parameter.dim() == 3:
        parameter = parameter[0]  # the plain update takes one expert after the other
    on_device = torch.empty(parameter.shape, device="meta") if is_gpu else parameter
    rows = next(blocks(torch.atleast_1d(on_device)))
    in_block = (rows.stop - rows.start) * parameter[0].numel() if parameter.dim() else 1
    moments = parameter.numel() if rank is None else max(parameter.shape) * rank
    return 4 * (_BLOCK_COPIES * in_block + _MOMENT_COPIES * moments)


def head_and_largest(model: PreTrainedModel) -> tuple[int, int]:
    """(bytes of the head's gradient in fp32 and its own dtype, 0 where logits are the model's own way; bytes
    of the largest single gradient)."""
    head = read_head(model)
    in_both = 0 if head is None else head.layer.weight.numel() * (4 + head.layer.weight.dtype.itemsize)
    return in_both, max(p.nbytes for p in model.parameters())


def gathered_bytes(model: PreTrainedModel, held_elements: int) -> int:
    """What the trainer has at one time of weights that several ranks hold (apollo_worker.model.on_use): one
    layer's, or the largest of what is in no layer, and those whose small updates wait for one another."""
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    of_layers = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [p.nbytes for p in model.parameters() if id(p) not in inside]
    total = sum(p.nbytes for p in model.parameters())
    waiting = held_elements * next(model.parameters()).element_size()
    return min(total, max([*of_layers, *outside]) + waiting)


def general_assumptions(model: PreTrainedModel, device: Device) -> list[str]:
    said = [
        "every token of the longest example is a target",
        "vLLM's own activations are not told apart from its KV cache",
        "a few vectors that vLLM keeps in fp32 count as the others do",
    ]
    if getattr(model.config, "layer_types", None) and "linear_attention" in model.config.layer_types:
        said.append(
            "linear attention counts as transformers' plain code makes it; flash-linear-attention's kernels, "
            "where installed, keep less"
        )
    if (model_type := model.config.model_type).endswith("_text"):
        said.append(f"only the text model ({model_type}) is counted, no vision tower")
    if device.is_gpu:
        said.append(f"a CUDA context takes {CUDA_CONTEXT_BYTES / 1e9:g} GB")
    return said


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _word(checkpointing: bool) -> str:
    return "with checkpointing" if checkpointing else "without checkpointing"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m apollo_worker.commands.memory_plan", description=__doc__)
    parser.add_argument("request", help="a Request as JSON")
    request = msgspec.json.decode(parser.parse_args(arguments).request, type=Request)
    transformers.utils.logging.set_verbosity_error()
    # Kernels of a GPU cannot run on tensors without memory: transformers takes its plain code where a package
    # is missing.
    sys.modules["fla"] = sys.modules["causal_conv1d"] = None  # pyright: ignore[reportArgumentType]
    try:
        print(msgspec.json.encode(plan(request)).decode())
    except ApolloError as error:
        told = {"message": error.message, "field": error.field, "code": error.code}
        print(msgspec.json.encode({"error": told}).decode())
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
