"""Messages and tools as vLLM hands them to a chat template.

What vllm/renderers/chat_utils.py (parse_chat_messages) and the request's types in
vllm/entrypoints/openai/chat_completion/protocol.py make of a request: null content, parts, reasoning,
arguments in JSON text, the order of keys, the role `developer`. A model is trained on what it will be shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from apollo_ipc.errors import UserError
from apollo_ipc.wire.decoded import is_object
from apollo_ipc.wire.requests import Message

ContentFormat = Literal["string", "openai"]
Rendered = dict[str, Any]  # one message as a template sees it

# Type of a text part -> the field that holds its text.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_CLIENT_HEADER = "x-anthropic-billing-header"  # a line that vLLM takes out of system messages


def invalid(message: str, field: str) -> UserError:
    return UserError(message, field=field, code="invalid_example")


def template_messages(
    messages: Sequence[Message], content_format: ContentFormat, path: str
) -> list[Rendered]:
    """path: of the list of messages. Raises UserError (`invalid_example`) with a field below it."""
    return [_message(one, content_format, f"{path}[{i}]") for i, one in enumerate(messages)]


def _message(message: Message, content_format: ContentFormat, field: str) -> Rendered:
    texts = _texts(message, field)
    if message.role == "system":
        texts = _without_client_header(texts)
    if content_format == "string":
        content = "\n".join(filter(None, texts))
    elif message.role == "tool":
        content = "\n".join(texts)
    else:
        content = [{"type": "text", "text": one} for one in texts]
    shown: Rendered = {"role": message.role, "content": content}
    if message.role == "assistant":
        if message.tool_calls:
            shown["tool_calls"] = [
                _call(call, f"{field}.tool_calls[{j}]", is_learned=message.weight != 0)
                for j, call in enumerate(message.tool_calls)
            ]
        if message.reasoning_content is not None:
            shown["reasoning"] = shown["reasoning_content"] = message.reasoning_content
    elif message.role == "tool" and message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    elif message.role == "developer":
        shown["tools"] = message.tools
    if message.name is not None:
        shown["name"] = message.name
    return shown


def _texts(message: Message, field: str) -> list[str]:
    """The texts of a message's content, part by part."""
    parts = message.content if message.content_parts is None else message.content_parts
    if isinstance(parts, str):
        return [parts]
    texts: list[str] = []
    for j, part in enumerate(parts or []):
        kind = "text" if isinstance(part, str) else part.get("type")
        name = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        text = part if isinstance(part, str) else part.get(name or "text")
        if name is None or not isinstance(text, str | None):
            raise invalid(
                f'only parts of text can be learned from or read, like {{"type": "text", "text": ...}}; '
                f"this one has the type {kind!r}",
                f"{field}.content[{j}]",
            )
        if text is not None:
            texts.append(text)
    return texts


def _without_client_header(texts: list[str]) -> list[str]:
    kept = [one.partition("\n")[2] if one.startswith(_CLIENT_HEADER) else one for one in texts]
    return [new for new, old in zip(kept, texts, strict=True) if new or not old.startswith(_CLIENT_HEADER)]


def _call(call: dict[str, Any], field: str, *, is_learned: bool) -> dict[str, Any]:
    """A tool call with the keys in the order of OpenAI's types and the arguments as an object.

    Where they are no object, vLLM shows an empty one; that is not learned.
    """
    function = call.get("function")
    if call.get("type", "function") != "function" or not is_object(function):
        raise invalid('a tool call is {"id", "type": "function", "function": {"name", "arguments"}}', field)
    arguments: Any = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = None
    if not is_object(arguments) and is_learned:
        raise invalid("the arguments of a tool call are not a JSON object", f"{field}.function.arguments")
    if not isinstance(function.get("name"), str):
        raise invalid("a tool call has the name of its function", f"{field}.function.name")
    rest = {name: value for name, value in function.items() if name not in ("arguments", "name")}
    others = {name: value for name, value in call.items() if name not in ("id", "function", "type")}
    return {
        **({"id": call["id"]} if "id" in call else {}),
        "function": {
            "arguments": arguments if is_object(arguments) else {},
            "name": function["name"],
            **rest,
        },
        "type": "function",
        **others,
    }


def template_tools(tools: list[dict[str, Any]] | None, path: str) -> list[dict[str, Any]] | None:
    """Tools with the keys that vLLM's types know, in their order; None for an empty list, too."""
    shown: list[dict[str, Any]] = []
    for j, tool in enumerate(tools or []):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not is_object(function):
            raise invalid(
                'a tool is {"type": "function", "function": {"name", "parameters"}}', f"{path}[{j}]"
            )
        if not isinstance(function.get("name"), str):
            raise invalid("a tool's function has a name", f"{path}[{j}].function.name")
        deferred = tool.get("defer_loading")
        known: dict[str, Any] = {name: function.get(name) for name in ("name", "description", "parameters")}
        optional = {
            "strict": function.get("strict"),
            "defer_loading": function.get("defer_loading", deferred),
        }
        known.update({name: value for name, value in optional.items() if value is not None})
        one: dict[str, Any] = {"type": "function", "function": known}
        shown.append(one if deferred is None else {**one, "defer_loading": deferred})
    return shown or None


def developer_as_system(messages: list[Rendered]) -> list[Rendered]:
    """For templates that do not know the role: all system messages as one, the first."""
    if all(one["role"] != "developer" for one in messages):
        return messages
    messages = [
        {**{k: v for k, v in one.items() if k != "tools"}, "role": "system"}
        if one["role"] == "developer"
        else one
        for one in messages
    ]
    if all(one["role"] != "system" for one in messages[1:]):
        return messages
    texts = [_joined(one["content"]) for one in messages if one["role"] == "system"]
    merged = {"role": "system", "content": "\n\n".join(filter(None, texts))}
    return [merged, *(one for one in messages if one["role"] != "system")]


def _joined(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
