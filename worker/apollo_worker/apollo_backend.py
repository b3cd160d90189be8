"""Which implementation of the update runs on a device: the fastest that can, or one that is asked for."""

from __future__ import annotations

import logging
from typing import Any

from apollo_ipc.errors import UserError
from apollo_worker.apollo_update import Backend, TorchBackend

log = logging.getLogger(__name__)
BACKENDS = {"cpu": "numba", "cuda": "triton"}  # by kind of device; "torch" runs everywhere


def choose_backend(device_type: str, name: str | None = None) -> Backend[Any]:
    """name: None for the fastest; without its compiler the plain one, with a line in the log.

    Raises UserError where a backend is asked for by a name that this device does not have.
    """
    wanted = name or BACKENDS.get(device_type, "torch")
    if wanted not in ("torch", BACKENDS.get(device_type)):
        raise UserError(
            f"backend {wanted} does not run on {device_type}; leave it out, or take torch", field="backend"
        )
    try:
        if wanted == "numba":
            from apollo_worker.apollo_cpu import NumbaBackend

            return NumbaBackend()
        if wanted == "triton":
            from apollo_worker.apollo_triton import TritonBackend

            return TritonBackend()
    except ImportError as error:
        if name is not None:
            raise
        log.warning("%s cannot be used (%s): the optimizer's step is the slow, plain one", wanted, error)
    return TorchBackend()
