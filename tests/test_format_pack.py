"""Packs: what goes in comes out, by two ranged reads for the trailer and one for a frame; repacking copies."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from blockstore.units import MIB
from snapshotd.compression import compress
from snapshotd.crypto import DomainKeys, Kind
from snapshotd.frame import MAX_STORED_FRAME, decode_frame
from snapshotd.index import MAX_OBJECT_FRAMES, MAX_OBJECT_SIZE, encode_parts, make_part
from snapshotd.pack import (
    FOOTER_SIZE,
    PACK_SIZE,
    ObjectWriter,
    check_object,
    decode_trailer,
    trailer_range,
)
from tests.format_objects import KEYS, OTHER_SNAPSHOT, SNAPSHOT, noise, repack, salt, words, write_pack

_FRAMES = st.lists(st.lists(st.integers(0, 20).map(words), min_size=1, max_size=64), min_size=1, max_size=6)


@settings(max_examples=50)
@given(_FRAMES)
def test_frames_come_back(frames: list[list[bytes]]) -> None:
    name, stored, entry = write_pack(frames)
    assert name == entry.object == hashlib.sha256(stored).hexdigest()
    assert entry.size == len(stored)
    (part,) = entry.parts
    assert (part.pack, part.snapshot, len(part)) == (salt(1), SNAPSHOT, len(frames))
    for frame, blocks in zip(part, frames, strict=True):
        ranged = stored[frame.offset : frame.offset + frame.length]
        assert decode_frame(KEYS, part.pack, frame.number, ranged) == blocks
        assert frame.blocks == len(blocks)
    trailer = check_object(KEYS, name, stored)
    assert trailer.parts == entry.parts
    assert trailer.hashes == (tuple(tuple(map(KEYS.block_hash, blocks)) for blocks in frames),)


def test_the_trailer_takes_two_reads() -> None:
    name, stored, entry = write_pack([[noise(1)], [words(2)]])
    start, length = trailer_range(stored[-FOOTER_SIZE:], len(stored), name)
    trailer = decode_trailer(KEYS, stored[start : start + length], start, name)
    assert trailer.parts == entry.parts
    assert start + length + FOOTER_SIZE == len(stored)


def test_an_object_is_full_at_its_size() -> None:
    writer, frame = ObjectWriter(KEYS, salt(1)), bytes(MAX_STORED_FRAME)
    hashes = [bytes([n]) * 16 for n in range(64)]
    number = 0
    while not writer.full:
        writer.copy(salt(1), SNAPSHOT, number, frame, hashes)
        number += 1
    assert PACK_SIZE <= writer.size < PACK_SIZE + MAX_STORED_FRAME
    with pytest.raises(ValueError, match="full or finished"):
        writer.copy(salt(1), SNAPSHOT, number, frame, hashes)
    _, buffers, entry = writer.finish()
    assert sum(map(len, buffers)) == entry.size < MAX_OBJECT_SIZE


def test_an_object_is_full_at_its_number_of_frames() -> None:
    """Where everything compresses to nothing, the trailer stays bounded."""
    writer = ObjectWriter(KEYS, salt(1))
    for number in range(MAX_OBJECT_FRAMES):
        assert not writer.full
        hashes = [hashlib.md5(b"%d %d" % (number, slot)).digest() for slot in range(64)]
        writer.copy(salt(1), SNAPSHOT, number, bytes(40), hashes)
    assert writer.full
    name, buffers, _ = writer.finish()
    stored = b"".join(buffers)
    start, length = trailer_range(stored[-FOOTER_SIZE:], len(stored), name)
    assert len(decode_trailer(KEYS, stored[start : start + length], start, name).parts[0]) == MAX_OBJECT_FRAMES


def test_an_object_is_finished_once_and_not_empty() -> None:
    with pytest.raises(ValueError, match="not without a frame"):
        ObjectWriter(KEYS, salt(1)).finish()
    writer = ObjectWriter(KEYS, salt(1))
    writer.copy(salt(2), SNAPSHOT, 0, bytes(100), [bytes(16)])
    writer.finish()
    with pytest.raises(ValueError, match="finished once"):
        writer.finish()
    with pytest.raises(ValueError, match="full or finished"):
        writer.copy(salt(2), SNAPSHOT, 1, bytes(100), [bytes(16)])


def test_repacking_copies_frames_of_several_packs() -> None:
    first = write_pack([[words(1)], [words(2)], [words(3)]], 1)
    second = write_pack([[words(4)], [words(5), words(6)]], 2, snapshot=OTHER_SNAPSHOT)
    keep = {(salt(1), 0), (salt(1), 2), (salt(2), 1)}
    name, stored, entry = repack([first[1:], second[1:]], keep, 3)
    check_object(KEYS, name, stored)
    assert [(part.pack, part.snapshot, list(part.numbers)) for part in entry.parts] == [
        (salt(1), SNAPSHOT, [0, 2]),
        (salt(2), OTHER_SNAPSHOT, [1]),
    ]
    frame = entry.parts[1].find(1)
    assert frame is not None
    ranged = stored[frame.offset : frame.offset + frame.length]
    assert decode_frame(KEYS, salt(2), 1, ranged) == [words(5), words(6)]
    again = repack([(stored, entry)], {(salt(1), 2)}, 4)
    assert [(part.pack, list(part.numbers)) for part in again[2].parts] == [(salt(1), [2])]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([(1, 3), (1, 3)], "frame 3 of pack .* after 3"),
        ([(1, 3), (1, 2)], "frame 2 of pack .* after 3"),
        ([(1, 0), (2, 0), (1, 1)], "do not follow one another"),
    ],
)
def test_frames_out_of_order_are_refused(frames: list[tuple[int, int]], message: str) -> None:
    writer = ObjectWriter(KEYS, salt(1))
    for pack, number in frames[:-1]:
        writer.copy(salt(pack), SNAPSHOT, number, bytes(100), [bytes(16)])
    pack, number = frames[-1]
    with pytest.raises(ValueError, match=message):
        writer.copy(salt(pack), SNAPSHOT, number, bytes(100), [bytes(16)])


@pytest.mark.parametrize("hashes", [[], [bytes(15)], [bytes(16)] * 65])
def test_hashes_that_are_none_are_refused(hashes: list[bytes]) -> None:
    with pytest.raises(ValueError, match="hashes"):
        ObjectWriter(KEYS, salt(1)).copy(salt(2), SNAPSHOT, 0, bytes(100), hashes)


def test_a_frame_that_no_reader_takes_is_not_written() -> None:
    for stored in (bytes(21), bytes(262_166)):
        with pytest.raises(ValueError, match="bytes"):
            ObjectWriter(KEYS, salt(1)).copy(salt(2), SNAPSHOT, 0, stored, [bytes(16)])


def _with_trailer(frames: bytes, content: bytes) -> bytes:
    trailer = KEYS.seal(Kind.TRAILER, b"", compress(content), salt(9))
    return frames + trailer + len(trailer).to_bytes(4, "little") + Kind.TRAILER.header


def test_a_trailer_that_says_something_else_is_refused() -> None:
    """As only somebody with the keys could write it: each statement is checked against the object."""
    _, stored, entry = write_pack([[words(1)], [words(2)]])
    (part,) = entry.parts
    frames = stored[: sum(part.lengths)]
    hashes = KEYS.block_hash(words(1)) + KEYS.block_hash(words(2))
    parts = encode_parts(entry.parts)
    good = _with_trailer(frames, parts + hashes)
    check_object(KEYS, hashlib.sha256(good).hexdigest(), good)
    wrong = {
        "hashes of other blocks": _with_trailer(frames, parts + hashes[::-1]),
        "a hash too many": _with_trailer(frames, parts + hashes + bytes(16)),
        "a hash too few": _with_trailer(frames, parts + hashes[:-16]),
        "frames missing": _with_trailer(frames[1:], parts + hashes),
        "bytes behind the frames": _with_trailer(frames + b"x", parts + hashes),
        "no frames": _with_trailer(b"", b"\0\0"),
        "another number": _with_trailer(
            frames,
            encode_parts([make_part(part.pack, SNAPSHOT, [f._replace(number=f.number + 1) for f in part])]) + hashes,
        ),
    }
    for changed in wrong.values():
        with pytest.raises(Corrupt):
            check_object(KEYS, hashlib.sha256(changed).hexdigest(), changed)


def _footer(length: int) -> bytes:
    return length.to_bytes(4, "little") + Kind.TRAILER.header


@pytest.mark.parametrize(
    ("footer", "size"),
    [
        (b"", 0),
        (_footer(100)[:-1], 1000),
        (_footer(100)[:-8] + Kind.INDEX.header, 1000),
        (_footer(1000), 1012),
        (_footer(1000), 500),
        (_footer(0), 1000),
        (_footer(45), 1000),
        (_footer((8 << 20) + 1), 32 << 20),
        (_footer(1000), (64 << 20) + 1),
    ],
)
def test_a_footer_that_cannot_be_is_refused(footer: bytes, size: int) -> None:
    """Also where the trailer would be empty, or all of the object: no ranged read of nothing is asked for."""
    with pytest.raises(Corrupt):
        trailer_range(footer, size, "this")


def test_a_footer_that_can_be_tells_where_the_trailer_is() -> None:
    assert trailer_range(_footer(46), 1000, "this") == (942, 46)
    assert trailer_range(_footer(8 << 20), 64 << 20, "this") == (56 * MIB - 12, 8 * MIB)


def test_the_same_blocks_in_another_domain_are_other_bytes() -> None:
    other = DomainKeys(bytes(16), bytes(range(100, 132)))
    name, stored, _ = write_pack([[words(1)]], keys=other)
    with pytest.raises(Corrupt):
        check_object(KEYS, name, stored)
    check_object(other, name, stored)
