"""The messages of Tinker's wire, from the installed SDK (the extra `tinker`), and arrays in them."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apollo_router.errors import HttpError

_NAME = "tinker.proto.tinker_public_pb2"


@cache
def schema() -> Any:
    """The module `tinker_public_pb2`. Read from its file: to import the package is to import a client, and
    torch with it. Raises HttpError where the SDK is not installed."""
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    package = find_spec("tinker")
    if package is None or not package.submodule_search_locations:
        raise HttpError(
            501, "tinker_missing", "Tinker's API needs the SDK beside vLLM: pip install 'apollo-ipc[tinker]'"
        )
    path = Path(package.submodule_search_locations[0], "proto", "tinker_public_pb2.py")
    spec = spec_from_file_location("apollo_router_tinker_public_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floats(values: Any) -> bytes:
    return np.asarray(values, dtype=np.float32).tobytes()


def ints(values: Any) -> bytes:
    return np.asarray(values, dtype=np.int32).tobytes()


def batched(arrays: list[NDArray[Any]]) -> Any:
    """BatchedTensor of one fp32 array a datum."""
    pb, parts = schema(), [floats(one) for one in arrays]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64).tobytes()
    return pb.BatchedTensor(data=b"".join(parts), offsets=offsets, dtype=pb.DTYPE_FLOAT32)
