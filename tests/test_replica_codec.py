"""What reads bring, as bytes: absent runs travel with it, and every number is checked before it is believed."""

import random

import pytest

from blockstore.errors import Corrupt, InvalidRequest
from blockstore.replica_codec import (
    absent_entry,
    decode_read_request,
    decode_read_response,
    encode_read_response,
    result_entry,
)
from blockstore.units import BLOCK_SIZE

#: Ranges 7 and 9 have three and two blocks, 8 was refused.
RESULTS = result_entry(7, 3, 0) + result_entry(8, 0, 14) + result_entry(9, 2, 0)
PAYLOAD = [bytes([number]) * BLOCK_SIZE for number in range(5)]
ABSENT = absent_entry(7, 0, 1) + absent_entry(7, 2, 1) + absent_entry(9, 0, 2)


def serialized(results: bytes, payload: list[bytes], message: str, absent: bytes = b"") -> bytes:
    return b"".join(encode_read_response(results, payload, message, absent))


def test_absent_runs_come_back_by_their_range() -> None:
    found = decode_read_response(serialized(RESULTS, PAYLOAD, "busy", ABSENT))
    assert found.results == [(7, 3, 0), (8, 0, 14), (9, 2, 0)]
    assert found.payload == b"".join(PAYLOAD)
    assert (found.message, found.absent) == ("busy", {7: [(0, 1), (2, 1)], 9: [(0, 2)]})


def test_without_a_source_nothing_is_added() -> None:
    message = serialized(RESULTS, PAYLOAD, "")
    assert decode_read_response(message).absent == {}
    assert message == serialized(RESULTS, PAYLOAD, "", b"")


@pytest.mark.parametrize(
    "absent",
    [
        absent_entry(7, 0, 4),
        absent_entry(7, 3, 1),
        absent_entry(7, 0, 0),
        absent_entry(7, (1 << 32) - 1, (1 << 32) - 1),
        absent_entry(8, 0, 1),
        absent_entry(10, 0, 1),
        absent_entry(7, 1, 1) + absent_entry(7, 0, 1),
        absent_entry(7, 0, 2) + absent_entry(7, 1, 1),
        absent_entry(7, 0, 1)[:-1],
        b"?",
    ],
)
def test_runs_that_are_in_no_result_are_refused(absent: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_read_response(serialized(RESULTS, PAYLOAD, "", absent))


@pytest.mark.parametrize("other", [b"", ABSENT[:16], ABSENT[16:] + ABSENT[:16], ABSENT[:32] + absent_entry(9, 0, 1)])
def test_absent_runs_that_were_changed_on_the_way_are_corrupt(other: bytes) -> None:
    """Else a block that somebody wrote might be fetched from the source."""
    message = serialized(RESULTS, PAYLOAD, "", ABSENT)
    forged = serialized(RESULTS, PAYLOAD, "", other)
    assert message != forged
    checksum = _checksum_field(message)
    with pytest.raises((Corrupt, InvalidRequest)):
        decode_read_response(forged.replace(_checksum_field(forged), checksum))


def test_any_flipped_bit_of_a_small_answer_is_noticed() -> None:
    message = serialized(result_entry(1, 1, 0), PAYLOAD[:1], "", absent_entry(1, 0, 1))
    wanted = decode_read_response(message)
    flips = random.Random(1)
    for at in [*range(80), *(flips.randrange(80, len(message)) for _ in range(50))]:
        for bit in range(8):
            changed = bytearray(message)
            changed[at] ^= 1 << bit
            try:
                found = decode_read_response(bytes(changed))
            except (Corrupt, InvalidRequest):
                continue
            assert (found.results, bytes(found.payload), found.absent) == (
                wanted.results,
                bytes(wanted.payload),
                wanted.absent,
            )


def test_what_is_no_read_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="ReadRequest"):
        decode_read_request(b"\xff\xff\xff")


def _checksum_field(message: bytes) -> bytes:
    """The nine bytes of the fixed field that holds the checksum."""
    at = message.index(bytes([3 << 3 | 1]), message.index(RESULTS) + len(RESULTS))
    return message[at : at + 9]
