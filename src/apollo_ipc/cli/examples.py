"""Training examples from a JSONL file: one example a line, in any of the forms."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import FORMS, MAX_EXAMPLES, Example, parse_example


def read_examples(file: Path) -> list[Example]:
    """The examples in `file` (`-`: standard input). Raises UserError naming the line and the field."""
    if str(file) == "-":
        return parse_examples(sys.stdin.buffer, "standard input")
    try:
        with file.open("rb") as lines:
            return parse_examples(lines, str(file))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", field="FILE") from None


def parse_examples(lines: Iterable[bytes], source: str) -> list[Example]:
    examples = []
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that Windows editors put first
        if not line.strip():
            continue
        if len(examples) == MAX_EXAMPLES:
            raise UserError(f"{source}: more than {MAX_EXAMPLES} examples; send several jobs", field="FILE")
        examples.append(_parse(line, number))
    if not examples:
        raise UserError(f"{source}: no examples; each line is one of {FORMS}", field="FILE")
    return examples


def _parse(line: bytes, number: int) -> Example:
    where = f"line {number}"
    try:
        data = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        # The two usual ways: pretty-printed JSON, and one array around all examples.
        advice = ""
        if line.strip() in (b"{", b"["):
            advice = "; one example is one line (`jq -c .` makes it so, `jq -c '.[]'` out of an array)"
        raise UserError(f"not JSON: {reason}{advice}", field=where, code="invalid_json") from None
    if isinstance(data, list):
        raise UserError("an array; one example is one line (`jq -c '.[]'` makes it so)", field=where)
    try:
        example = parse_example(data)
    except UserError as error:
        field = (error.field or "").removeprefix(".")
        raise UserError(
            error.message, field=f"{where}: {field}" if field else where, code=error.code
        ) from None
    return example
