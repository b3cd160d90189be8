"""What a client asks for when it creates a fine-tuning job, and the body of `POST /train` that it becomes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_ipc.config import Train
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import convert

Auto = Literal["auto"]
DPO_BETA = 0.1
_PREFERENCE = '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}'
# Where a part of a preference's line stands in the worker's words -> in its sender's.
_SENT = {
    "messages": "input.messages",
    "tools": "input.tools",
    "chosen": "preferred_output",
    "rejected": "non_preferred_output",
}


class Hyperparameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`auto`, or absent: the worker's configuration (train.epochs, train.accumulate_steps, train.lr)."""

    n_epochs: Annotated[int, Meta(ge=1, le=1000)] | Auto = "auto"
    batch_size: Annotated[int, Meta(ge=1, le=65536)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Meta(gt=0)] | Auto = "auto"


class Supervised(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hyperparameters: Hyperparameters | None = None


class DpoHyperparameters(Hyperparameters, frozen=True):
    beta: Annotated[float, Meta(gt=0)] | Auto = "auto"


class Dpo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hyperparameters: DpoHyperparameters | None = None


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Any = None


class CreateJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /fine_tuning/jobs`."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None  # the earlier place
    method: Method | None = None
    suffix: Annotated[str, Meta(max_length=64)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    integrations: list[Any] | None = None

    @property
    def given(self) -> Hyperparameters:
        inside = self.method and (self.method.dpo if self.is_dpo else self.method.supervised)
        return (inside and inside.hyperparameters) or self.hyperparameters or Hyperparameters()

    @property
    def is_dpo(self) -> bool:
        return self.method is not None and self.method.type == "dpo"


def read_create(data: Any, model_names: list[str]) -> CreateJob:
    """Raises UserError with the path of what is wrong, or of what one live copy of the weights cannot do."""
    create = convert(data, CreateJob)
    if create.model not in model_names:
        served = " or ".join(map(repr, model_names)) or "none yet"
        raise UserError(
            f"this server fine-tunes the model that it serves: {served}",
            field="model",
            code="model_not_found",
        )
    if (method := create.method) is not None:
        if method.type == "reinforcement":
            message = "method 'reinforcement' is not taken here, only 'supervised' and 'dpo'"
            raise UserError(f"{message}: rewards go to POST /train", field="method.type")
        for name in ("supervised", "dpo"):
            if name != method.type and getattr(method, name) is not None:
                raise UserError(f"the method's type is {method.type!r}", field=f"method.{name}")
    if create.validation_file is not None:
        raise UserError(
            "no validation file is taken: `apollo-ipc quality` watches the model", field="validation_file"
        )
    if create.integrations:
        raise UserError("no integration is known here; send none", field="integrations")
    return create


def resolved(create: CreateJob, defaults: Train) -> dict[str, Any]:
    """The hyperparameters in numbers."""
    given = create.given
    beta = {}
    if create.is_dpo:
        own = given.beta if isinstance(given, DpoHyperparameters) else "auto"
        beta["beta"] = DPO_BETA if own == "auto" else own
    return {
        **beta,
        "n_epochs": defaults.epochs if given.n_epochs == "auto" else given.n_epochs,
        "batch_size": defaults.accumulate_steps if given.batch_size == "auto" else given.batch_size,
        "learning_rate_multiplier": 1.0
        if given.learning_rate_multiplier == "auto"
        else given.learning_rate_multiplier,
    }


def train_body(create: CreateJob, content: bytes, defaults: Train) -> bytes:
    """The body of `POST /train` for the lines of a training file. Raises UserError, naming the line."""
    lines = [line for _, line in numbered_lines(content)]
    for number, line in numbered_lines(content):
        _check_line(number, line, is_dpo=create.is_dpo)
    if not lines:
        raise UserError("the training file is empty", field="training_file", code="invalid_training_file")
    numbers = resolved(create, defaults)
    options = {
        "epochs": numbers["n_epochs"],
        "accumulate_steps": numbers["batch_size"],
        "lr": defaults.lr * numbers["learning_rate_multiplier"],
        **({"loss": "dpo", "beta": numbers["beta"]} if create.is_dpo else {}),
    }
    return b'{"examples":[%s],"options":%s}' % (b",".join(lines), msgspec.json.encode(options))


def numbered_lines(content: bytes) -> list[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers (from 1) in the file."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    return [(n, line.strip()) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def _check_line(number: int, line: bytes, *, is_dpo: bool) -> None:
    names = ("input", "preferred_output", "non_preferred_output") if is_dpo else ("messages",)
    try:
        data = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _of_line(number, f"not JSON: {error}") from None
    if not isinstance(data, dict) or not all(name in data for name in names):
        wanted = _PREFERENCE if is_dpo else '{"messages": [...]}'
        raise _of_line(number, f"a line is an object like {wanted}")


def at_its_line(error: UserError, content: bytes) -> UserError:
    """The worker's error about an example or an option, in the words of who sent a file and a job."""
    field = error.field or ""
    if found := re.match(r"examples\[(\d+)\]\.?(.*)", field):
        number, line = numbered_lines(content)[int(found[1])]
        where = found[2]
        if "preferred_output" in msgspec.json.decode(line):
            for own, sent in _SENT.items():
                where = re.sub(rf"^{own}\b", sent, where)
        return _of_line(number, f"{where}: {error.message}" if where else error.message)
    names = {
        "epochs": "n_epochs",
        "accumulate_steps": "batch_size",
        "lr": "learning_rate_multiplier",
        "beta": "beta",
    }
    name = names.get(field.removeprefix("options."))
    return UserError(error.message, field=name and f"hyperparameters.{name}", code=error.code)


def _of_line(number: int, message: str) -> UserError:
    return UserError(f"line {number}: {message}", field="training_file", code="invalid_training_file")
