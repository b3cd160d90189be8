"""Examples and options as other programs write them, in this project's own shape.

An answer of a chat server as it came, OpenAI's and Hugging Face's names of options, ShareGPT, Alpaca: taken
where their meaning is plain; else one sentence says what to send.
"""

from __future__ import annotations

from typing import Any

from apollo_ipc.errors import UserError
from apollo_ipc.wire.decoded import is_list, is_object
from apollo_ipc.wire.foreign_answers import own_answers

OPTION_NAMES = {
    "learning_rate": "lr",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "accumulate_steps",
}
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Fields of an assistant's message that servers send, null or empty, and that no template reads.
_UNUSED = ("refusal", "annotations", "audio", "function_call")
_INSTEAD = {
    "refusal": "send a refusal that is to be learned as `content`",
    "audio": "only text can be learned",
    "function_call": "send it as `tool_calls`",
}
_WANTED = 'send {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
_SENTENCES = {
    "text": '`text` does not say which of it is to be learned: send {"prompt": "", "completion": text} to '
    f"learn all of it, or {_WANTED}",
    "question": f"`question` is no field of an example: {_WANTED}",
    "answer": f"`answer` is no field of an example: {_WANTED}",
    "response": f"`response` is no field of an example: {_WANTED}",
    "input": f"`input` is no field of an example: {_WANTED}",
    "input_ids": "send the tokens in two lists: context_ids (read) and continuation_ids (learned)",
    "labels": "send the tokens in two lists: context_ids (read) and continuation_ids (learned)",
}


def _invalid(message: str, field: str) -> UserError:
    return UserError(message, field=field, code="invalid_example")


def own_example(raw: Any, path: str) -> Any:
    """`raw` (decoded JSON) in the shape of Example, as far as it has another known one. Raises UserError with
    the path of what cannot be taken; what has no known shape is left to the check of types."""
    if not is_object(raw):
        return raw
    raw = own_answers(raw, path)
    if "conversations" in raw:
        raw = _from_sharegpt(raw, path)
    elif "instruction" in raw and "output" in raw:
        raw = _from_alpaca(raw, path)
    elif unknown := next((name for name in _SENTENCES if name in raw and "messages" not in raw), None):
        raise _invalid(_SENTENCES[unknown], f"{path}.{unknown}".removeprefix("."))
    if is_list(raw.get("messages")):
        field = f"{path}.messages".removeprefix(".")
        raw = {
            **raw,
            "messages": [_own_message(one, f"{field}[{i}]") for i, one in enumerate(raw["messages"])],
        }
    for name in ("chosen", "rejected"):
        if is_object(raw.get(name)):
            raw = {**raw, name: _own_message(raw[name], f"{path}.{name}".removeprefix("."))}
    return raw


def _own_message(raw: Any, field: str) -> Any:
    if not is_object(raw):
        return raw
    for name in _UNUSED:
        if raw.get(name) and name in _INSTEAD:
            raise _invalid(f"`{name}` is not learned: {_INSTEAD[name]}", f"{field}.{name}")
    message = {name: value for name, value in raw.items() if name not in _UNUSED}
    content = message.get("content")
    if content is None:
        # Only an answer may go without; of others the check of types says so.
        is_answer = message.get("role") == "assistant"
        message |= (
            {"content": "", "content_parts": message.get("content_parts", [])}
            if is_answer
            else {"content": None}
        )
    elif is_list(content):
        message |= {"content": "\n".join(filter(None, map(_text_of, content))), "content_parts": content}
    thought = message.pop("reasoning", None)
    if thought is not None:  # today's name; where both are given, vLLM takes this one
        message["reasoning_content"] = thought
    return message


def _text_of(part: Any) -> str:
    text = part.get("text") if is_object(part) else part
    return text if isinstance(text, str) else ""


def _from_sharegpt(raw: dict[str, Any], path: str) -> dict[str, Any]:
    field = f"{path}.conversations".removeprefix(".")
    turns = raw["conversations"]
    if not is_list(turns):
        raise _invalid(f"expected a list; {_WANTED}", field)
    messages: list[Any] = []
    if (system := raw.get("system")) is not None:
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(turns):
        if not is_object(turn) or "from" not in turn:
            messages.append(turn)  # with `role` and `content`: messages under another name
            continue
        role = _SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(sorted(_SPEAKERS))
            raise _invalid(f"known here: {known}; send anything else as `messages`", f"{field}[{i}].from")
        if not isinstance(turn.get("value"), str):
            raise _invalid("expected text", f"{field}[{i}].value")
        kept = {name: value for name, value in turn.items() if name == "weight"}
        messages.append({"role": role, "content": turn["value"], **kept})
    rest = {name: value for name, value in raw.items() if name not in ("conversations", "system", "id")}
    return {**rest, "messages": messages}


def _from_alpaca(raw: dict[str, Any], path: str) -> dict[str, Any]:
    for name in ("instruction", "input", "output", "system"):
        if not isinstance(raw.get(name, ""), str | None):
            raise _invalid("expected text", f"{path}.{name}".removeprefix("."))
    messages = [{"role": "system", "content": raw["system"]}] if raw.get("system") else []
    asked = "\n\n".join(filter(None, (raw["instruction"], raw.get("input"))))
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": raw["output"]}]
    rest = {k: v for k, v in raw.items() if k not in ("instruction", "input", "output", "system")}
    return {**rest, "messages": messages}


def own_options(raw: Any, field: str) -> Any:
    """Options under this project's names. Raises UserError where two names of one option are given."""
    if not is_object(raw):
        return raw
    options: dict[str, Any] = {}
    for name, value in raw.items():
        own = OPTION_NAMES.get(name) or name
        if own in options:
            raise UserError(
                f"this is {own!r} under another name; give one", field=f"{field}.{name}".lstrip(".")
            )
        options[own] = value
    return options


def sent_option(field: str, raw: Any) -> str:
    """The path of an option's error with the name that was sent."""
    head, _, name = field.rpartition(".")
    names = [sent for sent, own in OPTION_NAMES.items() if own == name and is_object(raw) and sent in raw]
    return f"{head}.{names[0]}" if names and head else field
