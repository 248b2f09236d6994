"""Messages that are taken apart by hand: as protobuf reads them, or refused."""

import random

import pytest
from google.protobuf.message import DecodeError

from blockstore.errors import InvalidRequest
from blockstore.grpc_payload import cut_out, put_in
from blockstore.rpc import snapshot_pb2 as pb

_PAYLOAD = pb.FetchResponse.PAYLOAD_FIELD_NUMBER
REST = pb.FetchResponse(mapped=b"abc", checksum=77)
MESSAGE = b"".join(put_in(REST, _PAYLOAD, [b"con", b"tent"]))


def test_a_message_comes_apart_as_it_was_put_together() -> None:
    rest, payload = cut_out(pb.FetchResponse, MESSAGE, _PAYLOAD)
    assert (rest, bytes(payload)) == (REST, b"content")
    assert pb.FetchResponse.FromString(MESSAGE).payload == b"content"


def test_of_a_payload_that_is_there_twice_the_last_one_counts() -> None:
    _, payload = cut_out(pb.FetchResponse, MESSAGE + b"".join(put_in(REST, _PAYLOAD, [b"other"])), _PAYLOAD)
    assert bytes(payload) == b"other"


def test_a_number_in_the_place_of_a_payload_is_an_unknown_field() -> None:
    _, payload = cut_out(pb.FetchResponse, MESSAGE + bytes([_PAYLOAD << 3, 5]), _PAYLOAD)
    assert bytes(payload) == b"content"


@pytest.mark.parametrize("seeds", [range(at, at + 500) for at in range(0, 4000, 500)], ids=lambda seeds: seeds.start)
def test_changed_bytes_are_read_as_protobuf_reads_them_or_refused(seeds: range) -> None:
    """Groups and fixed 32-bit fields, which none of our messages has, are refused where protobuf skips them."""
    for seed in seeds:
        check_changed(seed)


def check_changed(seed: int) -> None:
    chance, message = random.Random(seed), bytearray(MESSAGE * (1 + seed % 2))
    for _ in range(1 + seed % 3):
        at = chance.randrange(len(message))
        message[at : at + chance.randrange(2)] = chance.randbytes(chance.randrange(2))
    try:
        rest, payload = cut_out(pb.FetchResponse, bytes(message), _PAYLOAD)
    except InvalidRequest:
        return
    expected = pb.FetchResponse.FromString(bytes(message))
    assert (rest.mapped, rest.checksum, bytes(payload)) == (expected.mapped, expected.checksum, expected.payload)


@pytest.mark.parametrize("end", range(1, len(MESSAGE)))
def test_a_message_that_was_cut_off_is_refused_where_protobuf_refuses_it(end: int) -> None:
    try:
        expected = pb.FetchResponse.FromString(MESSAGE[:end])
    except DecodeError:
        with pytest.raises(InvalidRequest):
            cut_out(pb.FetchResponse, MESSAGE[:end], _PAYLOAD)
    else:
        assert bytes(cut_out(pb.FetchResponse, MESSAGE[:end], _PAYLOAD)[1]) == expected.payload
