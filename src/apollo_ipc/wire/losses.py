"""Which loss a job has: asked for, or said by the form of its examples. One job has one loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from apollo_ipc.errors import UserError
from apollo_ipc.wire.examples import Example

LossName = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "dpo", "kto", "grpo"
]  # fmt: skip
RATIO_LOSSES = ("importance_sampling", "ppo", "cispo", "dro")  # of `advantages` and `logprobs`

_WHAT = {
    "cross_entropy": "an example of what to say",
    "importance_sampling": "tokens with `advantages` and `logprobs`",
    "dpo": "a pair (`chosen`, `rejected`)",
    "kto": "an answer with a `label`",
    "grpo": "a group (`completions`, `rewards`)",
}
LOSS_OPTIONS = {
    "beta": ("dpo", "kto", "dro"),
    "clip": ("ppo", "cispo", "grpo"),
    "kl_to_reference": (*RATIO_LOSSES, "grpo"),
    "target_probability": ("cross_entropy",),
}


def form_of(example: Example) -> str:
    """The loss that an example of this form has where none is asked for."""
    if example.chosen is not None:
        return "dpo"
    if example.completions is not None:
        return "grpo"
    if example.label is not None:
        return "kto"
    return "cross_entropy" if example.advantages is None else "importance_sampling"


def resolve_loss(examples: Sequence[Example], loss: LossName | None, given: Sequence[str] = ()) -> LossName:
    """The job's loss. given: names of the options that are set.

    Raises UserError where an example has another form than this loss wants, or an option is of other losses.
    """
    wanted = form_of(examples[0]) if loss is None else loss
    form = "importance_sampling" if wanted in RATIO_LOSSES else wanted
    for i, example in enumerate(examples):
        if (own := form_of(example)) == form:
            continue
        if loss is None:
            message = f"this is {_WHAT[own]}, and examples[0] is {_WHAT[form]}: a job has one loss, send two"
        else:
            message = f"the loss {loss!r} wants {_WHAT[form]}, and this is {_WHAT[own]}"
        raise UserError(message, field=f"examples[{i}]", code="invalid_example")
    for name in given:
        if wanted not in (losses := LOSS_OPTIONS.get(name, (wanted,))):
            raise UserError(
                f"`{name}` is of the losses {', '.join(losses)}, and this job's is {wanted}",
                field=f"options.{name}",
            )
    return wanted  # pyright: ignore[reportReturnType]
