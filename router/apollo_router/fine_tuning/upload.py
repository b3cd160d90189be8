"""A file as the clients of OpenAI's API send it: multipart/form-data (RFC 7578), with a bound on its size."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import convert

FORM_BYTES = 64 * 1024  # what a form may be larger than its file


class Upload(msgspec.Struct, frozen=True):
    """expires_s: seconds after which it is deleted, None: never."""

    filename: str
    content: bytes
    expires_s: float | None


class _Expires(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=1, le=2**31)]


def read_upload(content_type: str, body: bytes) -> Upload:
    """Takes as long as the file is large: off the event loop. Raises UserError."""
    files, fields = _parts(content_type, body)
    if len(files.get("file", [])) != 1:
        raise UserError("send one file, as the form's field `file`", field="file")
    purpose = fields.get("purpose")
    if purpose != "fine-tune":
        raise UserError(
            f"a file here has the purpose 'fine-tune', not {purpose!r}: training alone reads it",
            field="purpose",
        )
    expires = {
        name.removeprefix("expires_after[").removesuffix("]"): value
        for name, value in fields.items()
        if name.startswith("expires_after[")
    }
    if unknown := sorted(
        name for name in fields if name != "purpose" and not name.startswith("expires_after[")
    ):
        raise UserError(f"unknown field {unknown[0]!r}", field=unknown[0])
    expires_s = None
    if expires:
        seconds: Any = expires.get("seconds", "")
        expires["seconds"] = int(seconds) if seconds.isdecimal() else seconds
        try:
            expires_s = convert(expires, _Expires).seconds
        except UserError as error:
            raise UserError(error.message, field=f"expires_after.{error.field or ''}".rstrip(".")) from None
    filename, content = files["file"][0]
    return Upload(filename, content, expires_s)


def _parts(content_type: str, body: bytes) -> tuple[dict[str, list[tuple[str, bytes]]], dict[str, Any]]:
    """(field -> its (file name, content)s, field -> text)."""
    # Of vLLM's environment, for its transcription routes (fastapi[standard]).
    from python_multipart import create_form_parser
    from python_multipart.exceptions import FormParserError

    files: dict[str, list[tuple[str, bytes]]] = {}
    fields: dict[str, Any] = {}

    def on_field(field: Any) -> None:
        fields[field.field_name.decode()] = (field.value or b"").decode()

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        name = (file.file_name or b"file").decode(errors="replace")
        files.setdefault(file.field_name.decode(), []).append((name, file.file_object.read()))
        file.close()

    try:
        parser = create_form_parser(
            {"Content-Type": content_type.encode()},
            on_field,
            on_file,
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},  # never in a temporary file
        )
        parser.write(body)
        parser.finalize()
        parser.close()
    except (FormParserError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"the body is no multipart form: {error}", code="invalid_form") from None
    return files, fields
