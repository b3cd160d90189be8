"""What an update costs through vLLM's own weight transfer, with a second copy of the weights; ours beside it.

One vLLM serves the same load three times: alone; while our worker trains its weights in place; and, after
the worker has ended, while a process on the same GPU that holds a copy of the checkpoint sends all of it,
several times, by vLLM's IPC backend. That process trains nothing: a trainer's steps and their memory would
come on top. The last update leaves vLLM with the checkpoint's weights again, by which it is checked.

    python benchmarks/gpu_transfer.py --preset 0.6b --json gpu_transfer.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_loop import add_arguments, check_arguments, measure, prepare, run_phases

if TYPE_CHECKING:
    from gpu_transfer_peer import Peer

PAUSES = ("keep", "wait", "abort")
EPILOG = (
    "The peer is served with VLLM_SERVER_DEV_MODE and VLLM_ALLOW_INSECURE_SERIALIZATION, which its transfer "
    "over HTTP needs: loopback only."
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], epilog=EPILOG)
    add_arguments(parser)
    parser.add_argument("--updates", type=int, default=5, help="full copies sent during their phase of load")
    parser.add_argument("--pause", choices=PAUSES, default="keep",
                        help="what vLLM does with running requests meanwhile; keep: they wait")  # fmt: skip
    options = parser.parse_args(arguments)
    check_arguments(parser, options)
    if options.updates < 1:
        parser.error("--updates: at least one is needed")
    return options


def main() -> int:
    from gpu_transfer_report import show

    options = parse_arguments()
    figures = measure(options, run)
    show(figures)
    load = figures.get("load", {})
    # What a full copy does to requests is a figure; ours have to be served.
    failed = sum(load[name]["num_failed"] for name in ("alone", "steps in place") if name in load)
    return 1 if "problem" in figures or failed else 0


def run(options: argparse.Namespace, base: Path, figures: dict[str, Any], peer: Peer | None = None) -> None:
    """As gpu_loop.run. peer: another one than vLLM's IPC backend."""
    from gpu_loop_phases import Loop, attach
    from gpu_loop_system import System
    from gpu_transfer_peer import ipc_peer
    from gpu_transfer_phases import full_copies, serve_alone, steps_in_place

    peer = peer or ipc_peer(base)
    model, flags, env = prepare(options, base, figures, beside_weights=1.0)
    figures["backend"] = peer.backend
    system = System(model.directory, base, [*flags, *peer.flags], {**env, **peer.env})

    def copies(loop: Loop) -> None:
        """The load while a second copy is sent."""
        full_copies(loop, peer)

    loop = Loop(system, model, options, figures)
    run_phases(loop, (attach, serve_alone, steps_in_place, copies))


if __name__ == "__main__":
    sys.exit(main())
