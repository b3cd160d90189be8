"""Is the result of a tool an error? The words `error` and `failed` alone are no sign: a log may hold them."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_LINES = 12  # of a plain text: an error is short, what was looked for may say `error` anywhere
MAX_LINE_CHARS = 400

_FAILED_STATUS = {"error", "failed", "failure", "fail"}
_FIRST_LINE = re.compile(
    r"\s*(?:<tool_use_error>|\[?(?:error|err|fatal|exception|failure|failed|fehler|"
    r"panic)\]?\s*(?:\([^)]*\)\s*)?[:!]|"
    r"(?:\w+\.)*\w*(?:Error|Exception)\b\s*(?::|\()|traceback \(most recent call last\)|"
    r"http(?:/[\d.]+)? (?:status )?[45]\d\d\b|status(?: code)?:? [45]\d\d\b|[45]\d\d (?:client|server) error|"
    r"usage: |invalid |unknown |unrecognized |cannot |can't |could not |couldn't |unable to |"
    r"permission denied|"
    r"access denied|not found|no such |missing |failed to |error\b.{0,20}$)",
    re.IGNORECASE,
)
# How programs complain: `program: what: reason`.
_COMPLAINT = re.compile(
    r"^(?:[\w./-]+: )*.{0,200}(?:no such file or directory|command not found|permission denied|"
    r"not a directory|"
    r"is a directory|operation not permitted|connection refused|connection timed out|"
    r"name or service not known|"
    r"no rule to make target|unrecognized (?:option|argument)|invalid (?:option|argument)|"
    r"unknown (?:option|command)|"
    r"does not exist|was not found|not found in|is not recognized|illegal option|syntax error)",
    re.IGNORECASE | re.MULTILINE,
)
_PROGRAM = re.compile(r"^[\w./-]+: ", re.MULTILINE)
_ALL_WELL = re.compile(
    r"nothing to be done|up to date|entering directory|leaving directory|\bok\b", re.IGNORECASE
)
_LAST_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b(?::|$)")
_EXIT_CODE = re.compile(r"\bexit(?:ed)?(?: with)?[ _]?(?:code|status)?\W{1,3}(\d+)", re.IGNORECASE)


def has_failed(result: str, program: str | None = None) -> bool:
    """By an error field or status of a JSON object, an exit code, or the form in which programs complain.

    program: that was run, if one was; what it says under its own name is a complaint."""
    text = result.strip()
    if text.startswith("{"):
        try:
            return _says_error(json.loads(text))
        except (ValueError, RecursionError):
            pass
    lines = [line[:MAX_LINE_CHARS] for line in text.splitlines()]
    if not lines:
        return False
    codes = _EXIT_CODE.findall(lines[0] + "\n" + lines[-1])
    if codes:
        return codes[-1] != "0"
    if lines[0].lower().startswith("traceback (most recent call last)"):
        return True
    if _FIRST_LINE.match(lines[0]) or _LAST_ERROR.match(lines[-1]):
        return len(lines) <= MAX_LINES
    if len(lines) > MAX_LINES:
        return False
    if program and lines[0].startswith(f"{program.rpartition('/')[2]}: "):
        return not _ALL_WELL.search(lines[0])
    return _complains(lines[0])


def _complains(line: str) -> bool:
    return bool(_PROGRAM.match(line) and _COMPLAINT.match(line)) or bool(
        len(line) < 200 and _COMPLAINT.match(line) and line.rstrip().endswith(".")
    )


def _says_error(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    if data.get("is_error") or data.get("isError") is True:
        return True
    if data.get("success") is False or data.get("ok") is False:
        return True
    if str(data.get("status", "")).lower() in _FAILED_STATUS:
        return True
    for name in ("exit_code", "exitCode", "returncode", "return_code"):
        if isinstance(data.get(name), int) and data[name] != 0:
            return True
    for name in ("status", "status_code", "statusCode", "code"):
        if isinstance(data.get(name), int) and 400 <= data[name] <= 599:
            return True
    if data.get("error"):
        return True
    return bool(data.get("errors")) and not data.get("data")
