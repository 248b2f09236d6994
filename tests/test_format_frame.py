"""Frames: any blocks come back, whatever is not that frame is refused, and nothing large is believed."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from snapshotd.compression import compress
from snapshotd.crypto import DomainKeys
from snapshotd.frame import MAX_STORED_FRAME, MIN_STORED_FRAME, compress_frame, decode_frame
from tests.format_objects import KEYS, noise, salt, words

_PACK = salt(1)


def _encode(blocks: Sequence[bytes | memoryview], number: int = 0) -> bytes:
    return KEYS.frame_cipher(_PACK).encrypt(number, compress_frame(blocks))


@given(st.lists(st.integers(0, 9).map(lambda n: noise(n) if n % 2 else words(n)), min_size=1, max_size=64))
def test_blocks_come_back(blocks: list[bytes]) -> None:
    assert decode_frame(KEYS, _PACK, 5, _encode(blocks, 5)) == blocks


def test_views_are_taken_as_they_are() -> None:
    content = memoryview(noise(1) + noise(2))
    assert decode_frame(KEYS, _PACK, 0, _encode([content[:4096], content[4096:]])) == [noise(1), noise(2)]


def test_blocks_may_come_joined() -> None:
    assert _encode([noise(1) + noise(2), noise(3)]) == _encode([noise(1), noise(2), noise(3)])


def test_a_frame_that_does_not_shrink_costs_its_header_and_tag() -> None:
    stored = _encode([noise(n) for n in range(64)])
    assert len(stored) == MAX_STORED_FRAME == 64 * 4096 + 5 + 16
    assert len(_encode([words(1)] * 64)) < 4096


@pytest.mark.parametrize("blocks", [[], [b""], [bytes(4095)], [bytes(4096), bytes(4095)], [bytes(4096)] * 65])
def test_what_is_no_frame_is_not_written(blocks: list[bytes]) -> None:
    with pytest.raises(ValueError, match="make no frame"):
        compress_frame(blocks)


def test_a_frame_is_bound_to_pack_number_and_domain() -> None:
    stored = _encode([words(1)], 5)
    for keys, pack, number in (
        (KEYS, _PACK, 4),
        (KEYS, salt(2), 5),
        (DomainKeys(bytes(16), bytes(range(100, 132))), _PACK, 5),
        (DomainKeys(KEYS.domain, bytes(32)), _PACK, 5),
    ):
        with pytest.raises(Corrupt, match=f"frame {number} of pack {pack.hex()} fails its authentication"):
            decode_frame(keys, pack, number, stored)


@pytest.mark.parametrize("size", [0, MIN_STORED_FRAME - 1, MAX_STORED_FRAME + 1])
def test_an_impossible_size_is_refused_unread(size: int) -> None:
    with pytest.raises(Corrupt, match=f"has {size} bytes"):
        decode_frame(KEYS, _PACK, 0, bytes(size))


@pytest.mark.parametrize("size", [0, 4095, 65 * 4096, 1 << 26])
def test_content_that_is_no_blocks_is_refused(size: int) -> None:
    """As only somebody with the key could write it, a bomb included."""
    stored = KEYS.frame_cipher(_PACK).encrypt(0, compress(bytes(size)))
    with pytest.raises(Corrupt):
        decode_frame(KEYS, _PACK, 0, stored)
