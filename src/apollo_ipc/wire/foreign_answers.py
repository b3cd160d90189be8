"""Pairs, labels and groups as other programs write them, in this project's own shape.

OpenAI's preference lines (input, preferred_output, non_preferred_output) and the conversational data sets of
Hugging Face's trainers, where prompt, chosen, rejected, completion and completions are lists of messages.
"""

from __future__ import annotations

from typing import Any

from apollo_ipc.errors import UserError
from apollo_ipc.wire.decoded import is_list, is_object

_PREFERENCES = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
# Of a request to a chat server; how it was sampled does not change what is learned.
_IN_INPUT = ("messages", "tools", "parallel_tool_calls")


def own_answers(raw: dict[str, Any], path: str) -> dict[str, Any]:
    """`raw` with its answers in the shape of Example, as far as they have another known one. Raises UserError
    with the path of what cannot be taken."""
    if "preferred_output" in raw or "non_preferred_output" in raw:
        raw = _from_preference(raw, path)
    if _is_conversation(raw.get("prompt")):
        raw = {("messages" if name == "prompt" else name): value for name, value in raw.items()}
    if (
        "messages" not in raw
        and _is_conversation(raw.get("chosen"))
        and _is_conversation(raw.get("rejected"))
    ):
        raw = _with_common_prompt(raw)
    raw = {name: _own(name, value, path) for name, value in raw.items()}
    if is_list(raw.get("messages")) and is_object(raw.get("completion")):
        # One answer with a label, or the prompt and completion of a data set.
        context = [_as_context(one) for one in raw["messages"]]
        rest = {name: value for name, value in raw.items() if name != "completion"}
        return {**rest, "messages": [*context, raw["completion"]]}
    return raw


def _own(name: str, value: Any, path: str) -> Any:
    field = f"{path}.{name}".removeprefix(".")
    if name in ("chosen", "rejected", "completion") and _is_conversation(value):
        return _only(value, field)
    if name == "completions" and is_list(value):
        return [
            {"message": _only(one, f"{field}[{i}]")} if _is_conversation(one) else one
            for i, one in enumerate(value)
        ]
    return value


def _is_conversation(value: Any) -> bool:
    return is_list(value) and bool(value) and all(map(is_object, value))


def _only(messages: list[Any], field: str) -> Any:
    if len(messages) != 1:
        raise UserError(
            "an answer is one message of the assistant; what comes before it belongs to `messages`",
            field=field,
            code="invalid_example",
        )
    return messages[0]


def _as_context(message: Any) -> Any:
    is_answer = is_object(message) and message.get("role") == "assistant"
    return {**message, "weight": 0} if is_answer else message


def _from_preference(raw: dict[str, Any], path: str) -> dict[str, Any]:
    asked = raw.get("input")
    field = f"{path}.input".removeprefix(".")
    if not is_object(asked):
        raise UserError(
            'a preference has an `input` like {"messages": [...]}', field=field, code="invalid_example"
        )
    if unknown := next((name for name in asked if name not in _IN_INPUT), None):
        raise UserError(
            f"unknown field {unknown!r} of a preference's input",
            field=f"{field}.{unknown}",
            code="invalid_example",
        )
    kept = {name: value for name, value in asked.items() if name != "parallel_tool_calls"}
    rest = {_PREFERENCES.get(name, name): value for name, value in raw.items() if name != "input"}
    return {**kept, **rest}


def _with_common_prompt(raw: dict[str, Any]) -> dict[str, Any]:
    """Two whole conversations: what they begin with is the context."""
    chosen, rejected = raw["chosen"], raw["rejected"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return {**raw, "messages": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
