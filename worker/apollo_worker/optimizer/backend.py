"""Which implementation of the update runs on a device: the fastest that can, or one that is asked for."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sysconfig
from typing import Any

from apollo_ipc.errors import UserError
from apollo_worker.optimizer.update import Backend, TorchBackend

log = logging.getLogger(__name__)
BACKENDS = {"cpu": "numba", "cuda": "triton"}  # by kind of device; "torch" runs everywhere


def choose_backend(device_type: str, name: str | None = None) -> Backend[Any]:
    """name: None for the fastest; without its compiler the plain one, with a line in the log.

    Raises UserError where a backend is asked for by a name that this device does not have, or by a name
    whose compiler is missing; ImportError where its package is.
    """
    wanted = name or BACKENDS.get(device_type, "torch")
    if wanted not in ("torch", BACKENDS.get(device_type)):
        raise UserError(
            f"backend {wanted} does not run on {device_type}; leave it out, or take torch", field="backend"
        )
    try:
        if wanted == "numba":
            from apollo_worker.optimizer.cpu import NumbaBackend

            return NumbaBackend()
        if wanted == "triton":
            from apollo_worker.optimizer.gpu import TritonBackend

            if (reason := why_nothing_compiles()) is None:
                return TritonBackend()
            raise UserError(f"triton cannot launch its kernels: {reason}", field="backend")
    except (ImportError, UserError) as error:
        if name is not None:
            raise
        log.warning("%s cannot be used (%s): the optimizer's step is the slow, plain one", wanted, error)
    return TorchBackend()


def why_nothing_compiles() -> str | None:
    """Why Triton could not build its launcher, a Python extension in C; None where it can.

    It would find out at the first step, in the middle of a job. The compiler is looked for as in
    triton/runtime/build.py (3.9), and has to read Python.h, which some systems have in a package of its own.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler: neither gcc nor clang is in PATH, and CC is not set"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = sysconfig.get_paths(scheme=scheme)["include"]
    command = [compiler, "-fsyntax-only", f"-I{include}", "-x", "c", "-"]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True)
    except OSError as error:
        return f"the C compiler {compiler} cannot be run: {error.strerror}"
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit {done.returncode}"]
    return f"{compiler} compiles no Python extension: {said[0]}"
