"""The encoding of copies: what goes in comes out, and nothing that was tampered with is believed."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from blockstore.record import block_checksum
from blockstore.storage.copies import (
    MAX_PART,
    CopiedBlock,
    ExtentCopy,
    MetaCopy,
    copied_position,
    decode_extent,
    decode_meta,
    encode_extent,
    encode_meta,
)
from blockstore.storage.keys import ExtentRow
from blockstore.storage.meta import Pin, SealedGeneration
from blockstore.units import EXTENT_BLOCKS, Generation, Sequence
from tests.storage_model import block, position

EXTENT = 7


def copied(number: int, generation: int, sequence: int, content: bytes | None) -> CopiedBlock:
    checksum = block_checksum(content or b"", number, generation, sequence)
    return CopiedBlock(number, Generation(generation), Sequence(sequence), checksum, content)


def extent_of(versions: int, sequence: int = 9) -> ExtentCopy:
    first = EXTENT * EXTENT_BLOCKS
    numbers = [(first + i % EXTENT_BLOCKS, 1 + i // EXTENT_BLOCKS) for i in range(versions)]
    blocks = [copied(n, g, i % sequence + 1, None if i % 9 == 4 else block(i)) for i, (n, g) in enumerate(numbers)]
    rows = {Generation(g): ExtentRow(Sequence(sequence), (1 << 256) - g) for g in range(1, 4)}
    return ExtentCopy(EXTENT, position(sequence), rows, blocks)


def small() -> list[bytes]:
    return encode_extent(extent_of(6))


@pytest.mark.parametrize("versions", [0, 1, 256, 700])
def test_an_extent_comes_out_as_it_went_in(versions: int) -> None:
    copy = extent_of(versions)
    parts = encode_extent(copy)
    assert all(len(part) <= MAX_PART for part in parts)
    assert len(parts) == max(1, -(-versions * 8 // 9 // 254))
    assert decode_extent(parts) == copy
    assert {copied_position(part) for part in parts} == {copy.position}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_anywhere_is_found(data: st.DataObject) -> None:
    (part,) = small()
    at = data.draw(st.integers(0, len(part) * 8 - 1))
    damaged = bytearray(part)
    damaged[at // 8] ^= 1 << at % 8
    with pytest.raises(Corrupt):
        decode_extent([bytes(damaged)])


@given(st.binary(max_size=300))
def test_rubbish_is_refused(rubbish: bytes) -> None:
    with pytest.raises(Corrupt):
        decode_extent([rubbish])
    with pytest.raises(Corrupt):
        decode_meta(rubbish)
    with pytest.raises(Corrupt):
        decode_extent([small()[0] + rubbish + b"x"])


def test_parts_must_be_all_in_order_and_of_one_extent() -> None:
    parts = encode_extent(extent_of(700))
    other = encode_extent(extent_of(700, sequence=10))
    for wrong in ([], parts[:-1], parts[1:], parts[::-1], [*parts[:-1], other[-1]], [parts[0]] * len(parts)):
        with pytest.raises(Corrupt):
            decode_extent(wrong)


def test_entries_from_after_the_position_or_twice_are_refused() -> None:
    copy = extent_of(3)
    late = copied(copy.blocks[0].number, 2, 10, None)
    for wrong in (late, copy.blocks[0]):
        with pytest.raises(Corrupt):
            decode_extent(encode_extent(ExtentCopy(EXTENT, copy.position, copy.rows, [*copy.blocks, wrong])))


def test_meta_comes_out_as_it_went_in() -> None:
    pins = [Pin(Generation(2), b"\x00x", Sequence(7), held=True)]
    sealed = [SealedGeneration(Generation(g), Sequence(g * 2), b"snap-%d" % g) for g in (1, 2)]
    copy = MetaCopy(position(9), Generation(3), b"source", sealed, pins)
    assert decode_meta(encode_meta(copy)) == copy
    assert copied_position(encode_meta(copy)) == copy.position
    taken_away = Pin(Generation(1), b"gone", Sequence(8), held=False)
    assert decode_meta(encode_meta(replace(copy, pins=[*pins, taken_away]))) == copy
