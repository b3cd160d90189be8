"""The protocol in which a dream program of your own feeds the bridge: JSON lines (UTF-8), version 1.

The first line, both ways, is {"protocol": 1}. Every further line has a `type`. What the program writes:

  {"type": "situation", "id", "messages", "seed"?, "lesson"?, "good"?, "topic"?, "parent"?, "judge"?}
      messages: OpenAI's, ending with the person or a tool's result. Instructions in it (curation.strip) are
      there for the response and left out of what is learned. lesson: what a verdict goes by; good: what a
      good response does; seed: the id of a seed (`s-...`), or its text, which is the lesson where none is
      given; parent: the id of the situation that this is a variation of. The answer is a `response`; with
      "judge": true our judge's `verdict` follows it.
  {"type": "verdict", "id", "good", "better"?, "reason"?, "confidence"?}
      On a response. good true: the response is learned; false: `better` is, which our dreamer writes where
      it is left out. confidence: 0 to 1, 1 where left out.
  {"type": "sample", "messages", "id"?, "seed"?, "lesson"?, "topic"?}
      Finished: the last message, an assistant's, is learned.
  {"type": "train"}
      Trains what was collected, now. By itself this happens at tier_dream.max_examples and at the end.
  {"type": "end"}
      Like the end of the input, for a program that wants to read on and cannot close its output.

What is answered, in the order in which it happens:

  {"type": "response", "id", "message": {"role": "assistant", "content"}}
  {"type": "verdict", "id", "good", "reason", "confidence", "better"?}     our judge's
  {"type": "trained", "id", "batch_id", "job_id", "weight_version"}
      job_id and weight_version are null where an earlier run trained it.
  {"type": "error", "message", "line", "id", "field"}                      null where there is none
  {"type": "done", "ended", "ended_by", "num_..."}                         always the last line

A wrong line is answered with an error and passed over; only a first line that is none of this protocol ends
the stream. At the end of the input what waits for a verdict is judged by our judge, what was collected is
trained, and `done` is written. Read answers while you write: they wait for you in a pipe.

An `id` names a situation or sample for good, in later runs too. The same line again (a program that starts
over after a crash) repeats what it came to; it is neither asked nor trained twice. The same id with another
content is an error. A sample without id is known by its content.

By file nobody reads the answers before the end: verdicts are refused there (who gave them cannot have seen
the response), so every situation is judged by our judge. The answers may go to a result file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_ipc.errors import UserError, nearest
from apollo_ipc.wire.requests import Message, convert

PROTOCOL_VERSION = 1

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Messages = Annotated[list[Message], Meta(min_length=1)]


class Situation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="situation"):
    id: Name
    messages: Messages
    seed: str | None = None
    lesson: str = ""
    good: str = ""
    topic: str | None = None
    parent: Name | None = None
    judge: bool = False


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="verdict"):
    id: Name
    good: bool
    better: Annotated[str, Meta(min_length=1)] | None = None
    reason: str = ""
    confidence: Annotated[float, Meta(ge=0, le=1)] = 1.0


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="sample"):
    messages: Messages
    id: Name | None = None
    seed: str | None = None
    lesson: str = ""
    topic: str | None = None


class TrainNow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="train"):
    pass


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="end"):
    pass


In = Situation | Verdict | Sample | TrainNow | End
_KINDS: dict[str, type[In]] = {
    "situation": Situation,
    "verdict": Verdict,
    "sample": Sample,
    "train": TrainNow,
    "end": End,
}


class Hello(msgspec.Struct, frozen=True):
    protocol: int = PROTOCOL_VERSION


class Response(msgspec.Struct, frozen=True, tag="response"):
    id: str
    message: Message


class OurVerdict(msgspec.Struct, frozen=True, tag="verdict"):
    id: str
    good: bool
    reason: str
    confidence: float
    better: str | None = None


class Trained(msgspec.Struct, frozen=True, tag="trained"):
    id: str
    batch_id: str | None = None
    job_id: str | None = None
    weight_version: int | None = None


class Error(msgspec.Struct, frozen=True, tag="error"):
    """line: number of the program's line, from 1; field: path of what is wrong in it."""

    message: str
    line: int | None = None
    id: str | None = None
    field: str | None = None


FeedEndedBy = Literal["input", "away", "stopped", "refused"]


class Done(msgspec.Struct, tag="done"):
    """num_unjudged: responses that nobody judged, the judge being switched off. ended: why; ended_by: before
    the end of the input, `away` (learner, judge or trainer), `stopped` (training) or `refused` (the first
    line, or all our requests). What was collected by then is kept, and trained by the next run."""

    num_situations: int = 0
    num_samples: int = 0
    num_good: int = 0
    num_bad: int = 0
    num_trained: int = 0
    num_failed: int = 0
    num_dropped: int = 0
    num_unjudged: int = 0
    num_errors: int = 0
    ended: str = "end of the input"
    ended_by: FeedEndedBy = "input"


Out = Hello | Response | OurVerdict | Trained | Error | Done


def parse_hello(line: bytes) -> None:
    """Raises UserError unless it is the first line of this version."""
    data = parse_line(line)
    version = data.get("protocol")
    if version is None:
        raise UserError('the first line must be {"protocol": 1}', field="protocol")
    if version != PROTOCOL_VERSION or set(data) != {"protocol"}:
        raise UserError(f"the protocol here is {PROTOCOL_VERSION}, not {version!r}", field="protocol")


def parse_line(line: bytes) -> dict[str, Any]:
    """Raises UserError."""
    try:
        data = msgspec.json.decode(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError("a line is one JSON object")
    return data


def as_message(data: dict[str, Any]) -> In:
    """Raises UserError with the path of the bad field."""
    kind: Any = data.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        if kind is None:
            raise UserError(f"one of {', '.join(_KINDS)} is needed", field="type")
        raise UserError(f"unknown type {kind!r}; {nearest(str(kind), _KINDS)}", field="type")
    return convert(data, _KINDS[kind])


def encode(answer: Out) -> bytes:
    return msgspec.json.encode(answer) + b"\n"


def role_problem(messages: list[Message], ends_with: Literal["question", "answer"]) -> str | None:
    """Why a situation (or a finished sample) cannot end as it does, or None."""
    last = messages[-1]
    if ends_with == "question" and last.role not in ("user", "tool"):
        return f"a situation ends with the user or a tool's result, not with the {last.role}"
    if ends_with == "answer" and last.role != "assistant":
        return f"a sample ends with the assistant's message, not with the {last.role}'s"
    if ends_with == "answer" and not last.content.strip() and not last.tool_calls:
        return "the last message is empty: nothing to learn"
    return None
