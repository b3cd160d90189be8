"""What a client may send to be trained on: the body of `POST /train`, a JSONL line, a stored job.

One set of types for the HTTP router, the CLI and the worker's queue. Structural checks (types, unknown
fields, ranges) happen here; checks that need the tokenizer happen in the worker before the job is queued.
"""

from __future__ import annotations

import re
import types
import typing
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from apollo_ipc.errors import UserError, nearest
from apollo_ipc.wire.decoded import is_list, is_object
from apollo_ipc.wire.examples import FORMS as FORMS
from apollo_ipc.wire.examples import Example as Example
from apollo_ipc.wire.examples import Message as Message
from apollo_ipc.wire.examples import TopLogprobs as TopLogprobs
from apollo_ipc.wire.examples import check_form as check_form
from apollo_ipc.wire.examples import has_sampler
from apollo_ipc.wire.foreign import OPTION_NAMES, own_example, own_options, sent_option
from apollo_ipc.wire.losses import LOSS_OPTIONS, LossName, resolve_loss

MAX_EXAMPLES = 100_000  # a job, not a corpus: beyond this send several

SyncKind = Literal["full", "delta"]  # whole shards, or only what differs from them
Version = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Clip = Annotated[float, Meta(gt=0)]


class TrainOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Options of one job; None means the worker's configured default.

    lr: learning rate (peak, where there is a warm-up); epochs: passes over the examples;
    schedule: "constant", "cosine" (10 % linear warm-up, then cosine to 0) or "auto" (constant for a single
    example, cosine otherwise); on_duplicate: what to do with an example that was trained before;
    accumulate_steps: examples of one update, which gets the mean of their losses; reduction: "sum" adds all
    targets of an update up, where "mean" takes the mean over an example's targets, then over examples (of
    grpo: over all targets of the update). loss: None is what the examples' form says. beta: of dpo, kto (0.1)
    and dro (0.05); clip: of ppo, cispo and grpo, how far the policy's ratio may be from 1 (0.2), or [below,
    above]; kl_to_reference: what a token's divergence from the weights before the job costs. beta1, beta2,
    eps: of the moments, in this job's steps. target_probability: of cross_entropy, what a target shall reach;
    beyond it there is no loss. embeddings: "freeze" leaves the embedding and the output layer as they are.
    """

    lr: Annotated[float, Meta(gt=0, le=0.1)] | None = None
    epochs: Annotated[int, Meta(ge=1, le=1000)] | None = None
    schedule: Literal["auto", "constant", "cosine"] | None = None
    weight_decay: Annotated[float, Meta(ge=0, le=1)] | None = None
    rank: Annotated[int, Meta(ge=1, le=65536)] | None = None
    max_steps: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    on_duplicate: Literal["skip", "train"] | None = None
    accumulate_steps: Annotated[int, Meta(ge=1, le=65536)] | None = None
    reduction: Literal["mean", "sum"] | None = None
    loss: LossName | None = None
    beta: Annotated[float, Meta(gt=0)] | None = None
    # A list: msgspec 0.22 crashes in the garbage collector with a union of a float and a tuple.
    clip: Clip | Annotated[list[Clip], Meta(min_length=2, max_length=2)] | None = None
    kl_to_reference: Annotated[float, Meta(ge=0)] | None = None
    beta1: Annotated[float, Meta(ge=0, lt=1)] | None = None
    beta2: Annotated[float, Meta(ge=0, lt=1)] | None = None
    eps: Annotated[float, Meta(gt=0)] | None = None
    target_probability: Annotated[float, Meta(gt=0, le=1)] | None = None
    embeddings: Literal["train", "freeze"] | None = None


class TrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    examples: Annotated[list[Example], Meta(min_length=1, max_length=MAX_EXAMPLES)]
    options: TrainOptions = TrainOptions()


PIECEWISE_BYTES = 256 * 1024

T = TypeVar("T")

_AT = re.compile(r" - at `(?P<path>\$[^`]*)`$")
_NO_CHOICE = re.compile(r"^Invalid enum value '(?P<name>.*)'$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$")


def convert(data: Any, into: type[T], at: str = "") -> T:
    """`data` (JSON-like values) as `into`, or UserError with the field's path and what would be right.

    at: where `data` stands in what the client sent."""
    try:
        return msgspec.convert(data, into)
    except msgspec.ValidationError as error:
        wrong = explain(error, data, into)
        inner = wrong.field or ""
        field = f"{at}.{inner}" if at and inner and not inner.startswith("[") else at + inner
        raise UserError(wrong.message, field=field or None) from None
    except RecursionError:
        raise UserError("nested too deeply", field=at or None) from None


def explain(error: msgspec.ValidationError, data: Any, into: Any) -> UserError:
    """msgspec's message with its JSON path as `field`, and the nearest known name for an unknown one."""
    text = str(error)
    at = _AT.search(text)
    path = at["path"].removeprefix("$").removeprefix(".") if at else ""
    text = _AT.sub("", text)
    if unknown := _UNKNOWN.match(text):
        known = _fields_at(into, path)
        field = f"{path}.{unknown['name']}" if path else unknown["name"]
        return UserError(f"unknown field {unknown['name']!r}; {nearest(unknown['name'], known)}", field=field)
    if wrong := _NO_CHOICE.match(text):
        known = list(typing.get_args(_kind_at(into, path)))
        text = f"{wrong['name']!r} is no choice here; {nearest(wrong['name'], known)}"
    return UserError(text, field=path or None)


def _fields_at(into: Any, path: str) -> list[str]:
    """Names of the fields of the struct that `path` points at."""
    kind = _kind_at(into, path)
    return list(kind.__struct_fields__) if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else []


def _kind_at(into: Any, path: str) -> Any:
    """The type of what `path` (as msgspec writes it: `a.b[0].c`) points at."""
    kind = into
    for part in re.findall(r"[^.\[\]]+|\[[^\]]*\]", path):
        kind = _strip(kind)
        if part.startswith("["):
            kind = typing.get_args(kind)[-1]
        else:
            kind = typing.get_type_hints(kind, include_extras=True)[part]
    return _strip(kind)


def _strip(kind: Any) -> Any:
    """`kind` without Annotated, and one of a union: not None."""
    while True:
        origin = typing.get_origin(kind)
        if origin is Annotated:
            kind = typing.get_args(kind)[0]
        elif origin in (typing.Union, types.UnionType):
            choices = [a for a in typing.get_args(kind) if a is not type(None)]
            # Only an object has fields to name.
            kind = next((a for a in choices if hasattr(a, "__struct_fields__")), choices[0])
        else:
            return kind


# A high one without a low one behind it, or a low one without a high one before it; not where a backslash
# that is itself escaped stands before the u.
_LONE_SURROGATE = re.compile(
    rb"(?<!\\)(?:\\\\)*(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
_example = msgspec.json.Decoder(Example)
_IS_LIST_OF_OBJECTS = re.compile(rb"\[\s*\{")


def parse_json(body: bytes) -> Any:
    """Raises UserError (code `invalid_json`)."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(error, body) from None


def _not_json(error: Exception, body: bytes) -> UserError:
    if isinstance(error, RecursionError):
        return UserError("the body is nested too deeply", code="invalid_json")
    reason = str(error)
    if _LONE_SURROGATE.search(body):  # of which msgspec says that the data was truncated
        reason = "half of a surrogate pair (\\ud800 to \\udfff) without its other half"
    return UserError(f"the body is not JSON: {reason}", code="invalid_json")


def parse_train_body(body: bytes) -> TrainRequest:
    """The body of `POST /train`: today's shape, or the earlier clients' `training_data` shape.

    Raises UserError with the path of the bad field as the client wrote it.
    """
    return parse_train_data(_parse_piecewise(body) if len(body) > PIECEWISE_BYTES else parse_json(body))


def _parse_piecewise(body: bytes, at: str = "") -> Any:
    """As parse_json, the members of long lists one at a time: other threads get the interpreter's lock in
    between. Raises UserError (code `invalid_json`), with the path of the member. at: of what is in `body`."""
    try:
        parts = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:  # no object
        return parse_json(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(error, body) from None
    return {name: _parse_part(bytes(part), f"{at}{name}") for name, part in parts.items()}


def _parse_part(part: bytes, at: str) -> Any:
    is_long = len(part) > PIECEWISE_BYTES
    if is_long and part[:1] == b"{" and "." not in at:  # one level: `training_data`
        return _parse_piecewise(part, f"{at}.")
    if is_long and _IS_LIST_OF_OBJECTS.match(part):
        members = msgspec.json.decode(part, type=list[msgspec.Raw])
        return [_parse_member(bytes(member), f"{at}[{i}]") for i, member in enumerate(members)]
    return _parse_member(part, at)


def _parse_member(member: bytes, at: str) -> Any:
    if at.startswith(("examples[", "training_data.samples[")):
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _example.decode(member)  # a third of the time
    try:
        return msgspec.json.decode(member)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        wrong = _not_json(error, member)
        raise UserError(wrong.message, field=at, code=wrong.code) from None


class SyncBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /checkpoint`, where there is one."""

    kind: SyncKind = "full"


class RestoreBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /checkpoint/restore`."""

    version: Version


class PinBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /checkpoint/pin`; null takes the pin away."""

    version: Version | None


def parse_train_data(data: Any) -> TrainRequest:
    """Like `parse_train_body`, from decoded JSON."""
    if not is_object(data):
        raise UserError('send an object like {"examples": [{"prompt": "...", "completion": "..."}]}')
    if "training_data" in data:
        return _from_training_data(data)
    if "examples" not in data and not data.keys().isdisjoint(_OF_AN_EXAMPLE):
        return _from_bare_example(data)
    body = {name: value for name, value in data.items() if name not in _OPTIONS_BESIDE}
    beside = {name: value for name, value in data.items() if name in _OPTIONS_BESIDE}
    if beside and is_object(body.get("options", {})):
        body["options"] = {**body.get("options", {}), **beside}
    return _parse(body, beside)


def _parse(body: dict[str, Any], beside: dict[str, Any]) -> TrainRequest:
    """beside: options that were sent beside `options`."""
    sent = body.get("options", {})
    if "options" in body:
        body = {**body, "options": own_options(sent, "options")}
    if is_list(examples := body.get("examples")):
        body = {**body, "examples": [_own(one, f"examples[{i}]") for i, one in enumerate(examples)]}
    try:
        if is_list(examples) and len(examples) <= MAX_EXAMPLES:  # each alone, for the interpreter's lock
            own = enumerate(body["examples"])
            body = {**body, "examples": [convert(one, Example, f"examples[{i}]") for i, one in own]}
        request = convert(body, TrainRequest)
        check_request(request)
    except UserError as error:
        field = sent_option(error.field or "", sent)
        if field.removeprefix("options.") in beside:
            field = field.removeprefix("options.")
        raise UserError(error.message, field=field or None, code=error.code) from None
    return request


def _own(example: Any, at: str) -> Any:
    return example if isinstance(example, Example) else own_example(example, at)


def _from_bare_example(data: dict[str, Any]) -> TrainRequest:
    """An example as the body is a job of one; options stand beside it."""
    beside = {name: value for name, value in data.items() if name in _OPTIONS_BESIDE}
    example = {name: value for name, value in data.items() if name not in (*beside, "options")}
    body: dict[str, Any] = {"examples": [example]}
    if beside or "options" in data:
        options = data.get("options", {})
        body["options"] = {**options, **beside} if is_object(options) else options
    try:
        return _parse(body, beside)
    except UserError as error:
        field = (error.field or "").removeprefix("examples[0]").removeprefix(".")
        raise UserError(error.message, field=field or None, code=error.code) from None


def check_request(request: TrainRequest) -> LossName:
    """The job's loss. Raises UserError unless each example has one complete form, and all examples and
    options are of that loss."""
    options = request.options
    for i, example in enumerate(request.examples):
        check_form(example, f"examples[{i}]")
    given = [name for name in LOSS_OPTIONS if getattr(options, name) is not None]
    loss = resolve_loss(request.examples, options.loss, given)
    given = [has_sampler(example) for example in request.examples]
    if any(given) and not all(given):
        raise UserError(
            "either all answers of a job have `logprobs`, or none",
            field=f"examples[{given.index(False)}]",
            code="invalid_example",
        )
    low = options.clip[0] if isinstance(options.clip, list) else options.clip
    if low is not None and low > 1:
        raise UserError("below 1 a ratio has at most 1 to fall: clip it by at most 1", field="options.clip")
    return loss


def parse_example(data: Any) -> Example:
    """One example from decoded JSON, in any known shape. Raises UserError with the path inside it."""
    example = convert(own_example(data, ""), Example)
    check_form(example, "")
    return example


def _from_training_data(data: dict[str, Any]) -> TrainRequest:
    """`{"training_data": {"samples": [...], "config": {...}}}` as the earlier system's clients send it."""
    extra = set(data) - {"training_data"}
    if extra:
        raise UserError(f"unknown field beside training_data: {sorted(extra)[0]!r}", field=sorted(extra)[0])
    inner = data["training_data"]
    if not is_object(inner) or "samples" not in inner:
        raise UserError("training_data needs a list `samples`", field="training_data.samples")
    if unknown := sorted(set(inner) - {"samples", "config"}):
        raise UserError(
            f"unknown field {unknown[0]!r}; {nearest(unknown[0], ['samples', 'config'])}",
            field=f"training_data.{unknown[0]}",
        )
    try:
        return _parse({"examples": inner["samples"], "options": inner.get("config", {})}, {})
    except UserError as error:
        field = (error.field or "").replace("examples", "samples", 1).replace("options", "config", 1)
        raise UserError(error.message, field=f"training_data.{field}".rstrip("."), code=error.code) from None


_OF_AN_EXAMPLE = {*Example.__struct_fields__, "conversations", "instruction", "text"}
_OPTIONS_BESIDE = {*TrainOptions.__struct_fields__, *OPTION_NAMES}
