"""Records and answers on a stream of messages come back as they were; what changed on its way is not believed."""

import random
import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from blockstore.append_codec import decode_answer, decode_append, encode_answer, encode_append
from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.errors import Corrupt, InvalidRequest
from blockstore.record import Record
from blockstore.replica_codec import MAX_BATCH_BYTES
from blockstore.replication.messages import Append, AppendAnswer, CatchUp, FencedBy
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import Epoch, Sequence
from tests.replication_parts import A, B, C, at, run_of

numbers = st.integers(0, (1 << 64) - 1)
small = st.integers(0, (1 << 32) - 1)
positions = st.builds(Position, numbers.map(Epoch), numbers.map(Sequence))
catch_ups = st.builds(CatchUp, positions, positions, st.lists(st.sampled_from([A, B, C])).map(tuple))
acked = st.lists(st.tuples(st.sampled_from([A, B, C]), positions), max_size=4).map(tuple)
runs = st.integers(0, 3).map(lambda count: run_of(2, 1, 1 + count)[:count])
appends = st.builds(
    Append, numbers.map(Epoch), small, numbers, positions, positions, runs, st.none() | catch_ups, acked, numbers
)
answers = st.builds(
    AppendAnswer,
    st.just(Epoch(7)), numbers, positions, positions, positions,
    *[st.booleans()] * 3, numbers, numbers, st.booleans(),
) | st.builds(FencedBy, numbers.map(Epoch), small)  # fmt: skip


def peer(replica: ReplicaId) -> pb.Peer:
    return pb.Peer(replica=replica, address=f"{replica}:1")


def joined(message: Append) -> bytes:
    return b"".join(encode_append(message, peer))


@given(appends)
def test_a_message_comes_back_as_it_was(message: Append) -> None:
    received = decode_append(joined(message))
    assert received.message == message
    wanted = message.catch_up.peers if message.catch_up else ()
    assert [(each.replica, each.address) for each in received.peers] == [(each, f"{each}:1") for each in wanted]


@given(answers)
def test_an_answer_comes_back_as_it_was(answer: AppendAnswer | FencedBy) -> None:
    assert decode_answer(encode_answer(answer), Epoch(7)) == answer


RECORDS: tuple[Record, ...] = run_of(2, 1, 2)
MESSAGE = Append(Epoch(2), 1, 7, at(1, 4), at(2, 9), RECORDS, CatchUp(at(2, 8), at(1, 3), (B,)), ((C, ORIGIN),), 3)
ANSWER = AppendAnswer(Epoch(2), 7, at(2, 3), at(2, 2), at(2, 4), True)


def test_any_flipped_bit_of_a_message_is_noticed() -> None:
    encoded, flips = joined(MESSAGE), random.Random(1)
    head = len(encoded) - sum(len(record.encoded) for record in RECORDS)
    for byte in [*range(head), *(flips.randrange(head, len(encoded)) for _ in range(100))]:
        changed = bytearray(encoded)
        changed[byte] ^= 1 << flips.randrange(8)
        with pytest.raises((Corrupt, InvalidRequest)):
            decode_append(bytes(changed))


@pytest.mark.parametrize("answer", [ANSWER, FencedBy(Epoch(9), 4)])
def test_any_flipped_bit_of_an_answer_is_noticed(answer: AppendAnswer | FencedBy) -> None:
    """A position that nobody acked would count as an ack."""
    encoded = encode_answer(answer)
    for bit in range(8 * len(encoded)):
        changed = bytearray(encoded)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Corrupt, InvalidRequest)):
            decode_answer(bytes(changed), Epoch(2))


def test_what_ends_early_is_refused() -> None:
    message, answer = joined(MESSAGE), encode_answer(ANSWER)
    for end in (*range(200), len(message) - 1):
        with pytest.raises((Corrupt, InvalidRequest)):
            decode_append(message[:end])
    for end in range(len(answer)):
        with pytest.raises((Corrupt, InvalidRequest)):
            decode_answer(answer[:end], Epoch(2))


@given(st.binary(max_size=200))
def test_nonsense_is_refused(nonsense: bytes) -> None:
    with pytest.raises((Corrupt, InvalidRequest)):
        decode_append(nonsense)
    with pytest.raises((Corrupt, InvalidRequest)):
        decode_answer(nonsense, Epoch(2))


def checked(content: bytes) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(content)) + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        encode_answer(FencedBy(Epoch(9), 4))[8:].replace(b"\x80", b"\0", 1),
        b"\x80" + encode_answer(ANSWER)[9:],
        b"\x81" + encode_answer(FencedBy(Epoch(9), 4))[9:],
        b"\x40" + encode_answer(ANSWER)[9:],
    ],
)
def test_an_answer_whose_checksum_is_right_and_whose_flags_are_not_is_refused(content: bytes) -> None:
    """FencedBy ends an attachment: nothing else is taken for it."""
    with pytest.raises(InvalidRequest):
        decode_answer(checked(content), Epoch(2))


def test_more_than_a_batch_is_refused() -> None:
    sizes = struct.pack("<I", MAX_BATCH_BYTES + 1)
    header = struct.pack("<QQIQQQQII", 1, 2, 1, 1, 4, 2, 9, 0, 1)
    with pytest.raises(InvalidRequest, match="records of"):
        decode_append(checked(header + sizes) + bytes(MAX_BATCH_BYTES + 1))


def test_sizes_beyond_the_message_take_no_memory() -> None:
    encoded = bytearray(joined(MESSAGE))
    struct.pack_into("<I", encoded, 8 + 56, (1 << 32) - 1)
    with pytest.raises(InvalidRequest, match="says that it has"):
        decode_append(bytes(encoded))
