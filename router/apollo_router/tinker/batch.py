"""What a forward_backward says: examples, their loss, and the body of `POST /train` that they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from apollo_ipc.errors import UserError
from apollo_router.tinker.bodies import AdamParams
from apollo_router.tinker.schema import batched, schema

Array = NDArray[np.float64]

# What each loss takes beside `target_tokens`, and of `loss_fn_config`.
_POLICY = ("logprobs", "advantages", "weights")
_CLIP = ("clip_low_threshold", "clip_high_threshold")
_INPUTS = {
    "cross_entropy": ("weights",), "importance_sampling": _POLICY, "ppo": _POLICY, "cispo": _POLICY,
    "dro": _POLICY,
}  # fmt: skip
_CONFIG = {"ppo": _CLIP, "cispo": _CLIP, "dro": ("beta",)}
_NEEDED = ("logprobs", "advantages")


class Datum(NamedTuple):
    """One sequence. tokens: N inputs and the last target behind them; inputs: (N,) each, of the N targets;
    is_used: (N,) whether a target's term counts. Where it does, target i is token i + 1."""

    tokens: list[int]
    inputs: dict[str, Array]
    is_used: NDArray[np.bool_]

    @property
    def is_next(self) -> NDArray[np.bool_]:
        """Of each target, whether it is the next token: only then its log-probability is known."""
        return np.asarray(self.tokens[1:]) == self.inputs["target_tokens"]


class LossBatch(NamedTuple):
    """config: of the loss, what was sent."""

    loss: str
    config: dict[str, float]
    data: list[Datum]


def read_batch(body: bytes) -> LossBatch:
    """A ForwardBackwardRequest. Takes as long as it is large: off the event loop. Raises UserError with the
    name of what is not served."""
    message = schema().ForwardBackwardRequest()
    message.ParseFromString(body)
    if (loss := message.loss_fn) not in _INPUTS:
        raise UserError(f"loss_fn {loss!r} is not served here; {', '.join(_INPUTS)} are", field="loss_fn")
    config = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise UserError(f"{loss} takes numbers, no text", field=f"loss_fn_config.{name}")
        config[name] = value.number
    if unknown := sorted(set(config) - set(_CONFIG.get(loss, ()))):
        takes = " and ".join(_CONFIG.get(loss, ())) or "no configuration"
        raise UserError(f"{loss} takes {takes}, not {unknown[0]}", field=f"loss_fn_config.{unknown[0]}")
    if not message.data:
        raise UserError("data is empty: nothing to compute", field="data")
    return LossBatch(loss, config, [_read(one, loss, f"data[{i}]") for i, one in enumerate(message.data)])


def _read(datum: Any, loss: str, path: str) -> Datum:
    tokens: list[int] = []
    for chunk in datum.model_input:
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise UserError("only text is trained here, no images", field=f"{path}.model_input")
        tokens += np.frombuffer(chunk.encoded_text.tokens, np.int32).tolist()
    inputs = {name: _array(value, f"{path}.{name}") for name, value in datum.loss_fn_inputs.items()}
    names = ("target_tokens", *_INPUTS[loss])
    if unknown := sorted(set(inputs) - set(names)):
        raise UserError(f"{loss} takes {', '.join(names)}, not {unknown[0]}", field=f"{path}.{unknown[0]}")
    for name in ("target_tokens", *(set(_NEEDED) & set(names))):
        if name not in inputs:
            raise UserError(f"{loss} needs `{name}`", field=f"{path}.{name}")
    for name, values in inputs.items():
        if len(values) != len(tokens) or not np.isfinite(values).all():
            raise UserError(
                f"expected {len(tokens)} finite numbers, one for each token of model_input",
                field=f"{path}.{name}",
            )
    if not tokens:
        raise UserError("model_input is empty", field=f"{path}.model_input")
    weights = inputs.setdefault("weights", np.ones(len(tokens)))
    is_used = weights != 0
    if "advantages" in inputs and loss != "dro":  # whose term is not 0 where the advantage is
        is_used &= inputs["advantages"] != 0
    found = Datum([*tokens, int(inputs["target_tokens"][-1])], inputs, is_used)
    if (wrong := np.flatnonzero(is_used & ~found.is_next)).size:
        raise UserError(
            "a target that counts is the next token of model_input; of others set the weight "
            f"or the advantage to 0 (target {wrong[0]} is another one)",
            field=f"{path}.target_tokens",
        )
    return found


def _array(tensor: Any, path: str) -> Array:
    pb = schema()
    if tensor.WhichOneof("encoding") != "dense" or len(tensor.shape) > 1:
        raise UserError("one number for each token: [T, K] and sparse targets are not served", field=path)
    kinds = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64, pb.DTYPE_INT32: np.int32}
    if tensor.dtype not in kinds:
        raise UserError("numbers are float32, int32 or int64", field=path)
    return np.frombuffer(tensor.dense, kinds[tensor.dtype]).astype(np.float64)


def loss_sum(batch: LossBatch, logprobs: Sequence[Array]) -> float:
    """What the batch's terms add up to. logprobs: (N,) of each datum's targets."""
    return sum(
        float(_terms(batch, one, lp)[one.is_used].sum()) for one, lp in zip(batch.data, logprobs, strict=True)
    )


def _terms(batch: LossBatch, one: Datum, logp: Array) -> Array:
    """The formulas: apollo_worker.step.objectives."""
    weights = one.inputs["weights"]
    if batch.loss == "cross_entropy":
        return -logp * weights
    advantages, log_ratio = one.inputs["advantages"], logp - one.inputs["logprobs"]
    ratio = np.exp(log_ratio)
    low, high = (batch.config.get(name, 1 + by) for name, by in zip(_CLIP, (-0.2, 0.2), strict=True))
    match batch.loss:
        case "importance_sampling":
            terms = ratio * advantages
        case "ppo":
            terms = np.minimum(ratio * advantages, ratio.clip(low, high) * advantages)
        case "cispo":
            terms = ratio.clip(low, high) * logp * advantages
        case other:
            assert other == "dro", other
            terms = logp * advantages - batch.config.get("beta", 0.05) / 2 * log_ratio**2
    return -terms * weights


def answer(batch: LossBatch, logprobs: Sequence[Array]) -> bytes:
    """A ForwardBackwardOutput."""
    num_targets = sum(int(one.is_used.sum()) for one in batch.data)
    metrics = {"loss:sum": loss_sum(batch, logprobs), "num_tokens:sum": float(num_targets)}
    output = schema().ForwardBackwardOutput(loss_fn_output_type="TorchLossReturn", metrics=metrics)
    record = output.loss_fn_outputs.add(num_datums=len(batch.data))
    record.fields["logprobs"].CopyFrom(batched(list(logprobs)))
    return output.SerializeToString()


def train_body(batches: Sequence[LossBatch], adam: AdamParams) -> bytes:
    """One step on all of them, their terms added up. Takes as long as it is large. Raises UserError."""
    loss, config = batches[0].loss, batches[0].config
    for batch in batches[1:]:
        if (batch.loss, batch.config) != (loss, config):
            raise UserError(
                f"the forward_backwards of one optim_step have one loss and one configuration, and these "
                f"have {loss} {config} and {batch.loss} {batch.config}"
            )
    if adam.grad_clip_norm:
        raise UserError(
            "grad_clip_norm is not served: each gradient is used up as it is made, so their norm is never "
            "known; leave it 0 (APOLLO limits how much larger an update may be than the one before)",
            field="adam_params.grad_clip_norm",
        )
    examples = [_example(one) for batch in batches for one in batch.data if one.is_used.any()]
    if not examples:
        raise UserError("all weights or advantages are 0: there is nothing to step on")
    options: dict[str, Any] = {
        "loss": loss, "reduction": "sum", "accumulate_steps": len(examples), "epochs": 1,
        "schedule": "constant", "on_duplicate": "train", "lr": adam.learning_rate,
        "weight_decay": adam.weight_decay, "beta1": adam.beta1, "beta2": adam.beta2, "eps": adam.eps,
    }  # fmt: skip
    if set(config) & set(_CLIP):
        low, high = config.get(_CLIP[0], 0.8), config.get(_CLIP[1], 1.2)
        options["clip"] = [round(1 - low, 9), round(high - 1, 9)]
    if "beta" in config:
        options["beta"] = config["beta"]
    return msgspec.json.encode({"examples": examples, "options": options})


def _example(one: Datum) -> dict[str, Any]:
    """From its first target that counts to its last: what is before is context, what is behind is nothing."""
    used = np.flatnonzero(one.is_used)
    first, end = int(used[0]), int(used[-1]) + 1
    example: dict[str, Any] = {
        "context_ids": one.tokens[: first + 1],
        "continuation_ids": one.tokens[first + 1 : end + 1],
        "weights": np.where(one.is_used, one.inputs["weights"], 0.0)[first:end].tolist(),
    }
    if "advantages" in one.inputs:
        example["advantages"] = one.inputs["advantages"][first:end].tolist()
        # A sampler's fp32 may round to just above 0.
        example["logprobs"] = one.inputs["logprobs"][first:end].clip(max=0.0).tolist()
    return example
