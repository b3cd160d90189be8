"""What the SDK sends as JSON. A field that is not known here is refused unless it asks for nothing."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import convert, parse_json
from apollo_router.tinker.store import SamplerKind

T = TypeVar("T", bound=msgspec.Struct)


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`type`, which repeats the route, is left out."""


class LoraConfig(msgspec.Struct, frozen=True):
    rank: int
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(Body, frozen=True):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: dict[str, Any] = {}


class AdamParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Body, frozen=True):
    model_id: str
    seq_id: int
    adam_params: AdamParams


class SaveWeights(Body, frozen=True):
    """ttl_seconds: what is kept is said by checkpoint.history, and by the pin on the last save."""

    model_id: str
    seq_id: int
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveForSampler(SaveWeights, frozen=True):
    sampling_session_seq_id: int | None = None
    kind: SamplerKind = "snapshot"


class LoadWeights(Body, frozen=True):
    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] = {}


class CreateSamplingSession(Body, frozen=True):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Chunk(msgspec.Struct, frozen=True):
    type: str = "encoded_text"
    tokens: list[int] | None = None


class ModelInput(msgspec.Struct, frozen=True):
    chunks: list[Chunk]

    def ids(self) -> list[int]:
        """Raises UserError where there is more than text."""
        found: list[int] = []
        for chunk in self.chunks:
            if chunk.type != "encoded_text" or chunk.tokens is None:
                raise UserError(f"only text is taken, no {chunk.type}", field="prompt.chunks")
            found += chunk.tokens
        return found


class Sample(Body, frozen=True):
    prompt: ModelInput
    sampling_params: SamplingParams
    sampling_session_id: str
    seq_id: int
    num_samples: int = 1
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None

    @property
    def is_scoring(self) -> bool:
        """compute_logprobs: the one token that it asks for besides is not looked at."""
        return self.prompt_logprobs and self.num_samples == 1 and self.sampling_params.max_tokens == 1


class SessionId(Body, frozen=True):
    session_id: str


class ModelId(Body, frozen=True):
    model_id: str


class RequestId(Body, frozen=True):
    request_id: str
    allow_metadata_only: bool = False


class TinkerPath(Body, frozen=True):
    tinker_path: str


class SavedPath(msgspec.Struct, frozen=True):
    """`tinker://MODEL_ID/weights/NAME` and `.../sampler_weights/NAME`."""

    model_id: str
    kind: Literal["weights", "sampler_weights"]
    name: str


def read_json(body: bytes, into: type[T]) -> T:
    """Raises UserError, naming what is wrong or not served."""
    data = parse_json(body) if body else {}
    if not isinstance(data, dict):
        raise UserError("the body is no JSON object")
    data.pop("type", None)
    known = into.__struct_fields__
    for name in [name for name in data if name not in known]:
        if data[name]:
            raise UserError(f"`{name}` is not served here; leave it out", field=name, code="not_served")
        del data[name]
    return convert({name: value for name, value in data.items() if value is not None}, into)


def read_path(path: str) -> SavedPath:
    """Raises UserError."""
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in ("weights", "sampler_weights"):
        raise UserError(f"{path!r} is no path of saved weights: tinker://MODEL_ID/weights/NAME", field="path")
    return SavedPath(parts[0], parts[1], parts[2])  # pyright: ignore[reportArgumentType]
