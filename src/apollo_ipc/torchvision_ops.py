"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

vLLM imports Qwen3.5 through its vision parent, which imports torchvision, and the package index has only the
CUDA build. There `torchvision/_C.so` cannot load, `torchvision/_meta_registrations.py` then fails on
"operator torchvision::nms does not exist", and so does every `from transformers import SomeModel`, of text
models too. Declaring the two operators that it registers fake kernels for is enough: torchvision's Python
parts work, its operators stay absent.

`apollo_ipc_torchvision.pth` runs `install()` when the interpreter starts, in every process that uses this
environment. It costs one entry in `sys.meta_path`; torch is imported only when somebody imports torchvision.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # torch.library.Library takes its declarations back when it is collected


def install() -> None:
    """From now on an import of torchvision first declares the operators that are missing. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        declare_missing_operators(Path(self.path).parent)
        super().exec_module(module)


def declare_missing_operators(torchvision_dir: Path) -> None:
    """Does nothing where torchvision's own library loads."""
    import torch

    for library in torchvision_dir.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        declared.define(schema)
    _libraries.append(declared)
