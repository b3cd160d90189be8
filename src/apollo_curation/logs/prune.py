"""Stripping on the raw record: JSON paths, and messages that no valid conversation has."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from apollo_curation.logs.strip import Prune, PruneFailed, Removed
from apollo_curation.settings import StripRule
from apollo_ipc.errors import UserError

Part = str | int
Parts = tuple[Part, ...]
TURNS = ("messages", "conversations")
INSTRUCTIONS = ("system", "developer")


def make_pruner(rules: list[StripRule]) -> Prune | None:
    """See strip.pruner."""
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
