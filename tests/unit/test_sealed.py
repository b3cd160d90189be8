import json

import msgspec
import pytest

from apollo_ipc.sealed import Damaged, seal, unseal


class Record(msgspec.Struct, frozen=True):
    name: str
    number: int
    tensors: dict[str, list[int]] = {}


RECORD = Record("é", 4711, {"a": [1, 2], "b": []})


def test_a_record_comes_back():
    assert unseal(seal(RECORD), Record) == RECORD
    assert msgspec.json.decode(seal(RECORD), type=Record) == RECORD  # an older program reads it


def test_a_record_of_an_older_program_is_read():
    assert unseal(msgspec.json.encode(RECORD), Record) == RECORD


def test_no_flipped_bit_gives_another_record():
    """One in the seal's own name leaves a record that is whole."""
    data, refused = seal(RECORD), 0
    for at in range(len(data) * 8):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        try:
            assert unseal(bytes(changed), Record) == RECORD
        except Damaged:
            refused += 1
    assert refused >= (len(data) - len(b',"seal":""}') - 32) * 8


def test_a_record_that_another_program_wrote_again_is_damaged():
    """Its numbers may be others, and the seal cannot tell."""
    again = json.dumps({**json.loads(seal(RECORD)), "number": 4712}).encode()
    with pytest.raises(Damaged, match="not those that were written"):
        unseal(again, Record)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff" * 9, b'{"\xb5":1}', b"[" * 100_000])
def test_what_is_no_record_is_damaged(data):
    with pytest.raises(Damaged):
        unseal(data, Record)
