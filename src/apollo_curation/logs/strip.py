"""Taking out the instructions that produced a behaviour, so that it moves into the weights.

What remains is a valid conversation, or `problem` says why there is none. Nothing is lost without a trace:
every part that was taken out is told, with its rule and its hash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec

from apollo_curation.logs.conversation import Conversation, find_problem, text_hash
from apollo_curation.logs.mend import is_empty, mend
from apollo_curation.settings import StripRule
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

NESTED = "markers within markers: taken out to the outermost end"
UNCLOSED = "no end marker: taken out to the end of the text"
STRAY = "an end marker without a beginning: only the marker was taken out"


class Removed(msgspec.Struct, frozen=True):
    """rule: its position among the rules, None for what only went with something; note: what was unusual."""

    rule: int | None
    text: str
    note: str = ""

    @property
    def hash(self) -> str:
        return text_hash(self.text)


class Stripped(msgspec.Struct, frozen=True):
    """problem: why the rest must not be used, or None; `removed` of the conversation holds all hashes."""

    conversation: Conversation
    removed: list[Removed]
    problem: str | None = None


# Takes parts out of a raw record, in place.
Prune = Callable[[dict[str, Any]], list[Removed]]


class PruneFailed(ValueError):
    """A rule could not be applied to a record, which so must not be used."""


def describe(rule: StripRule) -> str:
    """The rule as a person knows it from the configuration."""
    if rule.begin is not None:
        return f"{rule.begin} ... {rule.end}"
    name = next(name for name in ("role", "pattern", "json_path") if getattr(rule, name) is not None)
    return f"{name} {getattr(rule, name)}"


def strip(conversation: Conversation, rules: list[StripRule]) -> Stripped:
    """By the rules of role, marker and pattern, until none finds anything more (what a removal joins is
    looked at again). Applied to content, thoughts, and the text within tool calls' arguments.
    """
    removed: list[Removed] = []
    roles = {rule.role: i for i, rule in reversed(list(enumerate(rules))) if rule.role is not None}
    messages = list(conversation.messages)
    gone: set[int] = set()
    for i, message in enumerate(messages):
        if message.role in roles:
            removed.append(Removed(roles[message.role], whole_text(message)))
            gone.add(i)
            continue
        messages[i] = _strip_message(message, rules, removed)
        if messages[i] is not message and is_empty(messages[i]):
            gone.add(i)
    if not removed:
        return Stripped(conversation, [], find_problem(conversation.messages))
    messages, dropped = mend(messages, gone)
    removed += [Removed(None, whole_text(message), why) for message, why in dropped]
    hashes = [*conversation.removed, *(part.hash for part in removed)]
    rest = msgspec.structs.replace(conversation, messages=messages, removed=hashes)
    return Stripped(rest, removed, find_problem(messages) if messages else "nothing is left of it")


def whole_text(message: Message) -> str:
    """All that a message says: thought, content, calls."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls or []]
    return "\n".join(part for part in (message.reasoning_content, message.content, *calls) if part)


def _strip_message(message: Message, rules: list[StripRule], removed: list[Removed]) -> Message:
    """The same object where no rule finds anything."""
    changes: dict[str, Any] = {}
    content = strip_text(message.content, rules, removed)
    if content != message.content:
        changes["content"] = content
    if message.reasoning_content:
        thought = strip_text(message.reasoning_content, rules, removed)
        if thought != message.reasoning_content:
            changes["reasoning_content"] = thought or None
    calls = [_strip_call(call, rules, removed) for call in message.tool_calls or []]
    if calls != (message.tool_calls or []):
        changes["tool_calls"] = calls
    return msgspec.structs.replace(message, **changes) if changes else message


def _strip_call(call: dict[str, Any], rules: list[StripRule], removed: list[Removed]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = function["arguments"]
        rest = strip_text(arguments, rules, removed)
    else:
        rest = _strip_value(arguments, rules, removed)
    if rest == arguments:
        return call
    text = rest if isinstance(arguments, str) else json.dumps(rest, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _strip_value(value: Any, rules: list[StripRule], removed: list[Removed]) -> Any:
    if isinstance(value, str):
        return strip_text(value, rules, removed)
    if isinstance(value, list):
        return [_strip_value(one, rules, removed) for one in value]
    if isinstance(value, dict):
        return {name: _strip_value(one, rules, removed) for name, one in value.items()}
    return value


def strip_text(text: str, rules: list[StripRule], removed: list[Removed]) -> str:
    """`text` without what the marker and pattern rules name, which is added to `removed`."""
    while True:
        before = text
        for i, rule in enumerate(rules):
            if rule.begin is not None and rule.end is not None:
                found = _between(text, rule.begin, rule.end)
            elif rule.pattern is not None:
                matches = re.compile(rule.pattern, re.DOTALL).finditer(text)
                found = [(match.start(), match.end(), "") for match in matches if match.group()]
            else:
                continue
            removed += [Removed(i, text[start:stop], note) for start, stop, note in found]
            text = _without(text, found)
        if text == before:
            return text


Span = tuple[int, int, str]  # start, stop, note


def _between(text: str, begin: str, end: str) -> list[Span]:
    """From marker to marker, the outermost ones where they are nested; equal markers are taken in pairs."""
    if begin not in text and end not in text:
        return []
    spans: list[Span] = []
    strays: list[Span] = []
    depth, start, note = 0, 0, ""
    longest_first = sorted({begin, end}, key=len, reverse=True)
    for match in re.finditer("|".join(map(re.escape, longest_first)), text):
        if match.group() == begin and not (begin == end and depth):
            if depth:
                note = NESTED
            else:
                start, note = match.start(), ""
            depth += 1
        elif depth:
            depth -= 1
            if not depth:
                spans.append((start, match.end(), note))
        else:
            strays.append((*match.span(), STRAY))
    if depth:
        spans.append((start, len(text), UNCLOSED))
    return spans or strays  # what the spans leave may give a stray one its beginning


def _without(text: str, spans: list[Span]) -> str:
    """The text without the spans; of the blank lines around each one stays at most, at the edges no space."""
    if not spans:
        return text
    rest, at = text[: spans[0][0]], 0
    for i, (_, at, _) in enumerate(spans):
        stop = spans[i + 1][0] if i + 1 < len(spans) else len(text)
        left, right = rest.rstrip("\n"), text[at:stop].lstrip("\n")
        num_newlines = len(rest) - len(left) + stop - at - len(right)
        rest = left + "\n" * min(num_newlines, 2) + right
    if not text[: spans[0][0]].strip():
        rest = rest.lstrip()
    return rest if text[at:].strip() else rest.rstrip()


# --- on the raw record ---

Part = str | int
Parts = tuple[Part, ...]
TURNS = ("messages", "conversations")
INSTRUCTIONS = ("system", "developer")


def pruner(rules: list[StripRule]) -> Prune | None:
    """The part of the rules that needs the raw record: JSON paths, and messages of roles that no valid
    conversation has (a role of one's own; instructions in the middle). None where no rule asks for it.

    Raises UserError for a JSON path that cannot be read.
    """
    finders = [
        (i, rule.json_path, _finder(i, rule.json_path)) for i, rule in enumerate(rules) if rule.json_path
    ]
    roles = {rule.role: i for i, rule in enumerate(rules) if rule.role is not None}
    if not finders and not roles:
        return None

    def prune(record: dict[str, Any]) -> list[Removed]:
        removed = _prune_roles(record, roles) if roles else []
        for i, path, find in finders:
            for parts in find(record):
                if not parts:
                    raise PruneFailed(f"{path} names the whole record; nothing would be left")
                removed += [Removed(i, text) for text in [_take(record, parts)] if text]
        return removed

    return prune


def _finder(i: int, path: str) -> Callable[[Any], list[Parts]]:
    """Where a path leads in a record: the outermost matches, the last ones first, so that taking one out does
    not move another."""
    import jsonpath

    field = f"curation.strip[{i}].json_path"
    try:
        compiled = jsonpath.compile(path)
    except jsonpath.JSONPathError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path!r} is not a JSON path: {reason}; for example $.memory", field=field) from None

    def find(record: Any) -> list[Parts]:
        try:
            found = {tuple(match.parts) for match in compiled.finditer(record)}
        except (jsonpath.JSONPathError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            raise PruneFailed(f"{path} cannot be applied: {reason}") from None
        outermost = [parts for parts in found if not any(parts[:n] in found for n in range(len(parts)))]
        return sorted(outermost, key=_order, reverse=True)

    return find


def _order(parts: Parts) -> list[tuple[int, str]]:
    return [(part, "") if isinstance(part, int) else (-1, part) for part in parts]


def _take(record: dict[str, Any], parts: Parts) -> str:
    """Takes out what stands at `parts`; a whole message, and its content, is emptied instead, so that what
    depends on it is seen (mend.py)."""
    place: Any = record
    for part in parts[:-1]:
        place = place[part]
    last = parts[-1]
    value = place[last]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    is_of_message = len(parts) in (2, 3) and parts[0] in TURNS and isinstance(parts[1], int)
    if is_of_message and len(parts) == 2 and isinstance(value, dict):
        kept = {name: value[name] for name in ("role", "from", "tool_call_id", "name") if name in value}
        place[last] = kept | {"value" if "from" in kept else "content": ""}
    elif is_of_message and last in ("content", "value"):
        place[last] = ""
    else:
        del place[last]
    return text


def _prune_roles(record: dict[str, Any], roles: dict[str, int]) -> list[Removed]:
    """Takes out whole messages of the roles, except where strip.strip can do it: it knows more about them."""
    key = next((key for key in TURNS if isinstance(record.get(key), list)), None)
    if key is None:
        return []
    kept: list[Any] = []
    removed: list[Removed] = []
    has_begun = False
    for raw in record[key]:
        role = (raw.get("role") or raw.get("from")) if isinstance(raw, dict) else None
        is_instruction = role in INSTRUCTIONS
        if isinstance(role, str) and role in roles and (has_begun or not is_instruction):
            content = raw.get("content", raw.get("value"))
            text = content if isinstance(content, str) else json.dumps(content or "", ensure_ascii=False)
            removed.append(Removed(roles[role], text))
            continue
        has_begun = has_begun or not is_instruction
        kept.append(raw)
    record[key] = kept
    return removed
