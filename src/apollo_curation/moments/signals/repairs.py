"""A call that failed, and the one that worked instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from apollo_curation.moments.signals.evidence import Evidence, Noticed, likeness, words
from apollo_curation.moments.signals.tool_results import has_failed
from apollo_curation.moments.signals.turns import UserTurn, turns
from apollo_ipc.wire.requests import Message

SAME_TOOL = 0.6  # worked with other arguments
OTHER_TOOL = 0.4  # the very next call, of another tool, worked
CLOSE = 0.3  # the two calls differ in little
TOLD_BY_THE_ERROR = 0.3  # the working call holds what only the error said: it could not be known before
MIN_LIKENESS = 0.5
MIN_LIKENESS_OF_COMMANDS = 0.3  # a shell does everything: another command need not be the same attempt
MAX_ATTEMPTS = 12  # a call that works later than so many others is no repair of this one
MAX_KNOWN = 40  # messages before a call, in which what it could know is looked for
COMMAND_KEYS = ("command", "cmd", "code", "script", "argv")

# Programs that are run to hear what is wrong: tests, builds, linters, a script of one's own.
_CHECKS = re.compile(
    r"\b(?:pytest|tox|nox|unittest|(?:npm|yarn|pnpm|bun)(?: run)? \S*(?:test|build|lint|check)|jest|vitest|"
    r"cargo (?:test|build|check|clippy)|go (?:test|build|vet|run)|make|ninja|cmake|mvn|gradlew?|ruff|mypy|"
    r"pyright|flake8|pylint|eslint|tsc|ctest|rspec|phpunit|dotnet (?:test|build|run)|"
    r"(?:python[\d.]*|node|bash|sh|ruby|php) [^\s-]\S*\.\w+)(?=\s|$|[;&|])"
)
_NOT_RUN = re.compile(
    r"command not found|no such file or directory|can't open file|cannot find module|no module named|"
    r"unrecognized arguments|unknown option|^usage: |permission denied|not recognized as",
    re.IGNORECASE | re.MULTILINE,
)


class Attempt(msgspec.Struct, frozen=True):
    """One message with calls, and whether all its results are there; failed: all, none, or None for some."""

    at: int
    end: int
    failed: bool | None
    errors: str


def find_repairs(messages: list[Message]) -> Iterator[Noticed]:
    for turn in turns(messages):
        attempts = list(_attempts(turn))
        i = 0
        while i < len(attempts):
            found = _repair(messages, attempts, i) if attempts[i].failed else None
            if found:
                noticed, i = found
                yield noticed
            i += 1


def _attempts(turn: UserTurn) -> Iterator[Attempt]:
    messages = turn.messages
    for at in turn.steps:
        calls = messages[at].tool_calls or []
        results = messages[at + 1 : at + 1 + len(calls)]
        if not calls or len(results) < len(calls):
            continue
        failed = [_has_failed(call, result.content) for call, result in zip(calls, results, strict=True)]
        errors = "\n".join(result.content for result in results)
        yield Attempt(at, at + 1 + len(calls), failed[0] if len(set(failed)) == 1 else None, errors)


def _has_failed(call: dict[str, Any], result: str) -> bool:
    """A check that finds something has not failed: what comes next mends the code, not the call."""
    command = _command(call)
    if command and _CHECKS.search(command) and not _NOT_RUN.search(result):
        return False
    return has_failed(result, command.split()[0] if command and command.split() else None)


def _repair(messages: list[Message], attempts: list[Attempt], i: int) -> tuple[Noticed, int] | None:
    """The moment, and the attempt that repaired it. Of several failures the first is the decision."""
    failed = attempts[i]
    near = range(i + 1, min(len(attempts), i + 1 + MAX_ATTEMPTS))
    worked = [j for j in near if attempts[j].failed is False and messages[attempts[j].at].weight != 0]
    # The same tool's call is the repair, even where another tool was asked for advice before it.
    worked.sort(key=lambda j: _names(messages[attempts[j].at]) != _names(messages[failed.at]))
    for j in worked:
        evidence = _weigh(messages, failed, attempts[j], is_next=j == i + 1)
        if evidence.is_enough:
            # What it says beside the call speaks of the error.
            answer = msgspec.structs.replace(messages[attempts[j].at], content="", reasoning_content=None)
            reason, confidence = evidence.reason, evidence.confidence
            return Noticed("error_then_fix", failed.at, attempts[j].end, answer, reason, confidence), j
    return None


def _weigh(messages: list[Message], failed: Attempt, worked: Attempt, *, is_next: bool) -> Evidence:
    evidence = Evidence()
    first, second = messages[failed.at], messages[worked.at]
    if _functions(first) == _functions(second):
        return evidence  # the same call again: the error went away by itself
    alike = likeness(_arguments(first), _arguments(second))
    if _names(first) == _names(second):
        if _is_command(first) and alike < MIN_LIKENESS_OF_COMMANDS:
            return evidence
        evidence.add(SAME_TOOL, "a call failed, and the same tool worked with other arguments")
    elif is_next and alike >= MIN_LIKENESS_OF_COMMANDS:
        evidence.add(OTHER_TOOL, "a call failed, and another tool worked")
    else:
        return evidence
    if alike >= MIN_LIKENESS:
        evidence.add(CLOSE, "the two calls differ in little")
    told = (words(_arguments(second)) - words(_arguments(first))) & words(failed.errors)
    if told and evidence.is_enough:
        before = messages[max(0, failed.at - MAX_KNOWN) : failed.at]
        if told - words(" ".join(message.content for message in before)):
            evidence.doubt(TOLD_BY_THE_ERROR, "it holds what only the error said")
    return evidence


def _functions(message: Message) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], _parsed(call)) for call in message.tool_calls or []]


def _names(message: Message) -> list[str]:
    return [name for name, _ in _functions(message)]


def _arguments(message: Message) -> str:
    return " ".join(call["function"]["arguments"] for call in message.tool_calls or [])


def _is_command(message: Message) -> bool:
    parsed = [arguments for _, arguments in _functions(message)]
    return any(isinstance(one, dict) and any(key in one for key in COMMAND_KEYS) for one in parsed)


def _command(call: dict[str, Any]) -> str | None:
    """The shell command of a call; None where it is none."""
    arguments = _parsed(call)
    if not isinstance(arguments, dict):
        return None
    command = next((arguments[key] for key in COMMAND_KEYS if key in arguments), None)
    if isinstance(command, list):
        return " ".join(map(str, command))
    return command if isinstance(command, str) else None


def _parsed(call: dict[str, Any]) -> Any:
    try:
        return json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return call["function"]["arguments"]
