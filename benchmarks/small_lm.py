"""Shared by finetune.py and online.py: a small Qwen3 language model over bytes, and English that it knows.

Nothing is downloaded. The English is `pydoc_data.topics` (the language reference, some 0.5 MB), the other
text is the standard library's source: both come with every Python. A token is a byte.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from apollo_worker.jobs.job_plan import learning_rate
from torch import Tensor

VOCAB_SIZE = 256
SEQ = 128  # bytes predicted in a window; a window has one more
HELD_OUT_EVERY = 8  # of the topics, and of the source files, every eighth is never trained on
PRETRAIN_BATCH = 16
PRETRAIN_LR = 2e-3
WARMUP_FRACTION = 0.1

say = partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class ModelSettings:
    num_layers: int = 2
    hidden: int = 256  # at least 256, so that rank 64 is a quarter of the smaller dim
    intermediate: int = 768
    pretrain_steps: int = 500


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # (num_bytes,) uint8
    held_out: Tensor  # (num_bytes,) uint8, of other documents

    def held_out_windows(self, num: int) -> Tensor:
        """(num, SEQ + 1) int64, spread over the held-out text, none of them in `train`; always the same."""
        starts = torch.linspace(0, len(self.held_out) - SEQ - 1, 2 * num, dtype=torch.float64).long()
        known = self.train.numpy().tobytes()
        windows = [self.held_out[i : i + SEQ + 1] for i in starts.tolist()]
        new = [window for window in windows if window.numpy().tobytes() not in known]
        assert len(new) >= num, "the held-out text is not held out"
        return torch.stack([new[i * len(new) // num] for i in range(num)]).long()


def english() -> Corpus:
    from pydoc_data.topics import topics

    return _split([topics[name].encode() for name in sorted(topics)])


def python_source() -> Corpus:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    return _split([file.read_bytes() for file in files])


def _split(documents: list[bytes]) -> Corpus:
    """By documents; some share paragraphs, which are then left out of the held-out part."""
    train = [text for i, text in enumerate(documents) if i % HELD_OUT_EVERY]
    known = {paragraph for text in train for paragraph in text.split(b"\n\n")}
    candidates = [paragraph for text in documents[::HELD_OUT_EVERY] for paragraph in text.split(b"\n\n")]
    held_out = [paragraph for paragraph in candidates if paragraph not in known]
    return Corpus(as_tokens(b"\n\n".join(train)), as_tokens(b"\n\n".join(held_out)))


def as_tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def random_windows(text: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """(num, SEQ + 1) int64."""
    starts = torch.randint(len(text) - SEQ, (num,), generator=generator)
    return torch.stack([text[i : i + SEQ + 1] for i in starts.tolist()]).long()


def lm_loss(model: torch.nn.Module, windows: Tensor, num_context: int = 1) -> Tensor:
    """Mean cross-entropy (nats per byte) of `windows` (num, length) after their first `num_context` bytes."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits[:, num_context - 1 :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, num_context:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, windows: Tensor, batch: int = 16) -> float:
    parts = windows.split(batch)
    return sum(lm_loss(model, part).item() * len(part) for part in parts) / len(windows)


def new_model(settings: ModelSettings, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=settings.hidden, intermediate_size=settings.intermediate,
        num_hidden_layers=settings.num_layers, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=2 * SEQ, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apollo-ipc" / "bench"


def pretrained(settings: ModelSettings, cache: Path) -> dict[str, Tensor]:
    """fp32 weights by name after AdamW on the English; from `cache` where they are there already."""
    from safetensors.torch import load_file, save_file

    text = english().train
    key = [asdict(settings), PRETRAIN_BATCH, PRETRAIN_LR, SEQ, torch.__version__, transformers.__version__]
    digest = hashlib.sha256(json.dumps(key).encode() + text.numpy().tobytes()).hexdigest()[:16]
    path = cache / f"small_lm-{digest}.safetensors"
    if not path.exists():
        weights = _pretrain(settings, text)
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file(weights, part)
        part.replace(path)
    return load_file(path)


def _pretrain(settings: ModelSettings, text: Tensor) -> dict[str, Tensor]:
    model, generator = new_model(settings), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.01)
    num = settings.pretrain_steps
    for step in range(num):
        set_lr(optimizer, cosine(step, num, PRETRAIN_LR))
        loss = lm_loss(model, random_windows(text, PRETRAIN_BATCH, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == num - 1:
            say(f"pretraining: step {step + 1} of {num}, loss {loss.item():.3f}")
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def cosine(step: int, num_steps: int, peak: float) -> float:
    return learning_rate(step, num_steps, peak=peak, schedule="cosine", warmup_fraction=WARMUP_FRACTION)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class StoredModel:
    """Weights that rest in `dtype`, and a model that computes on them in fp32.

    What the benchmarks compare is the storage: what is lost when an update is written to a bf16 weight. The
    CPU's bf16 matrix product is many times slower than fp32's, so forward and backward run on an exact fp32
    copy of the stored weights; the gradient is then rounded to the storage's dtype, which is what the live
    system's backward gives. Activations in bf16, the same for every contestant, are left out.
    """

    def __init__(self, model: torch.nn.Module, weights: dict[str, Tensor], dtype: torch.dtype):
        self.model = model
        self._computed = list(model.parameters())
        named = [(name, weights[name].to(dtype, copy=True)) for name, _ in model.named_parameters()]
        self.named = [(name, torch.nn.Parameter(weight)) for name, weight in named]
        self.params = [param for _, param in self.named]
        self.load()

    @torch.no_grad()
    def load(self) -> None:
        for computed, stored in zip(self._computed, self.params, strict=True):
            computed.copy_(stored)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for computed, stored in zip(self._computed, self.params, strict=True):
            assert computed.grad is not None
            stored.grad = computed.grad.to(stored.dtype)
            computed.grad = None

    def num_elements(self) -> int:
        return sum(param.numel() for param in self.params)

    def grad_norm(self) -> float:
        return norm(param.grad for param in self.params if param.grad is not None)

    def weights(self) -> list[Tensor]:
        """fp32 copies."""
        return [param.detach().to(torch.float32, copy=True) for param in self.params]


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(torch.linalg.vector_norm(t, dtype=torch.float32).item() ** 2 for t in tensors))


def unknown_keywords(function: Callable, names: Iterable[str]) -> list[str]:
    """Those of `names` that `function` does not take."""
    return [name for name in names if name not in inspect.signature(function).parameters]
