"""JSON files that tell damage: their last field is the digest of all before it.

What such a file says is acted upon (where memory lies, which jobs are on disk), and a flipped bit in a number
is JSON as good as any. A file without the field is an older program's; one that has it elsewhere, or written
otherwise, is not ours.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
import xxhash

T = TypeVar("T")
_SEAL = re.compile(rb',"seal":"([0-9a-f]{32})"\}\Z')


class Damaged(ValueError):
    """Not what was written; the argument says why, for a sentence that names the file."""


def seal(record: msgspec.Struct) -> bytes:
    """As JSON. The record has a field."""
    data = msgspec.json.encode(record)
    return data[:-1] + b',"seal":"' + xxhash.xxh3_128_hexdigest(data).encode() + b'"}'


def unseal(data: bytes, into: type[T]) -> T:
    """Raises Damaged."""
    found = _SEAL.search(data)
    if found:
        data = data[: found.start()] + b"}"
    seal_of = xxhash.xxh3_128_hexdigest(data).encode()
    if seal_of != found[1] if found else b'"seal"' in data:
        raise Damaged("its bytes are not those that were written")
    try:
        return msgspec.json.decode(data, type=into)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(str(error)) from None
