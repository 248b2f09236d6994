"""Index objects, and many of them as one map: neither their order nor what was deleted of them matters."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from snapshotd.compression import compress
from snapshotd.crypto import Kind, name_of
from snapshotd.fields import column, text
from snapshotd.index import (
    MAX_INDEX_ENTRIES,
    MAX_REPLACES,
    Frame,
    Index,
    IndexEntry,
    IndexMap,
    Part,
    decode_index,
    encode_index,
    make_part,
)
from tests.format_objects import KEYS, OTHER_SNAPSHOT, SNAPSHOT, salt

_TRAILER_SIZE = 300


def entry(number: int, packs: dict[int, list[int]], length: int = 100) -> IndexEntry:
    """Object `number`: frames by number of each pack, all of `length` bytes and three blocks."""
    parts: list[Part] = []
    offset = 0
    for pack, frames in packs.items():
        places = [Frame(frame, offset + at * length, length, 3) for at, frame in enumerate(frames)]
        parts.append(make_part(salt(pack), OTHER_SNAPSHOT if pack % 2 else SNAPSHOT, places))
        offset += length * len(frames)
    return IndexEntry(name(number), offset + _TRAILER_SIZE, tuple(parts))


def name(number: int) -> str:
    return f"{number:064x}"


_FRAMES = st.lists(st.integers(0, 4095), min_size=1, max_size=20, unique=True).map(sorted)
_ENTRIES = st.builds(entry, st.integers(0, 20), st.dictionaries(st.integers(0, 9), _FRAMES, max_size=4))
_INDEXES = st.builds(
    Index,
    st.lists(_ENTRIES, max_size=5).map(tuple),
    st.lists(st.integers(0, 20).map(name), max_size=4).map(tuple),
)


@given(_INDEXES)
def test_an_index_comes_back(index: Index) -> None:
    its_name, stored = encode_index(KEYS, index, salt(1))
    assert its_name == name_of(stored)
    assert decode_index(KEYS, its_name, stored) == index


def test_frames_are_found_by_number() -> None:
    part = entry(1, {1: [0, 2, 9]}).parts[0]
    assert [part.find(number) for number in (0, 1, 2, 8, 9, 10)] == [
        Frame(0, 0, 100, 3),
        None,
        Frame(2, 100, 100, 3),
        None,
        Frame(9, 200, 100, 3),
        None,
    ]
    assert entry(1, {1: [0], 2: [5]}).part(salt(2)) == entry(1, {1: [0], 2: [5]}).parts[1]
    assert entry(1, {1: [0]}).part(salt(2)) is None


def test_what_is_too_much_for_one_index_is_not_written() -> None:
    one = entry(1, {1: [0]})
    with pytest.raises(ValueError, match="split it"):
        encode_index(KEYS, Index((one,) * (MAX_INDEX_ENTRIES + 1)), salt(1))
    with pytest.raises(ValueError, match="split it"):
        encode_index(KEYS, Index((), (name(1),) * (MAX_REPLACES + 1)), salt(1))
    everything = entry(1, {pack: list(range(64)) for pack in range(64)}, length=22)
    with pytest.raises(ValueError, match="at most 67108864; split it"):
        encode_index(KEYS, Index((everything,) * MAX_INDEX_ENTRIES), salt(1))


def test_an_index_costs_little() -> None:
    """1 GiB in packs of 16 MiB, frames of about 115 KiB."""
    sizes = random.Random(1)
    entries = []
    for number in range(64):
        lengths = [sizes.randrange(60_000, 170_000) for _ in range(142)]
        offsets = itertools.accumulate(lengths, initial=0)
        frames = [
            Frame(at, offset, length, 64) for at, (offset, length) in enumerate(zip(offsets, lengths, strict=False))
        ]
        entries.append(IndexEntry(salt(number).hex() * 2, 17 << 20, (make_part(salt(number), SNAPSHOT, frames),)))
    _, stored = encode_index(KEYS, Index(tuple(entries)), salt(1))
    assert len(stored) < 64 * 450


def _sealed(content: bytes) -> tuple[str, bytes]:
    stored = KEYS.seal(Kind.INDEX, b"", compress(content), salt(1))
    return name_of(stored), stored


def _raw_part(numbers: list[int], length: int = 100, blocks: int = 3, pack: int = 1) -> bytes:
    columns = column(numbers, 2) + column([length] * len(numbers), 4) + column([blocks] * len(numbers), 1)
    return salt(pack) + text(SNAPSHOT) + len(numbers).to_bytes(2, "little") + columns


def _raw_index(parts: list[bytes], size: int = 5000) -> bytes:
    head = bytes(4) + (1).to_bytes(4, "little") + bytes(32) + size.to_bytes(4, "little")
    return head + len(parts).to_bytes(2, "little") + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends at byte 0"),
        (_raw_index([]) + bytes(1), "1 bytes too many"),
        ((MAX_REPLACES + 1).to_bytes(4, "little") + bytes(200), "count of 65537"),
        (bytes(4) + (MAX_INDEX_ENTRIES + 1).to_bytes(4, "little") + bytes(200), "count of 4097"),
        (_raw_index([], (64 << 20) + 1), "count of 67108865"),
        (_raw_index([_raw_part([0, 1])], 199), "frames up to byte 200"),
        (_raw_index([_raw_part([0, 1, 1])]), "do not ascend"),
        (_raw_index([_raw_part([1, 0])]), "do not ascend"),
        (_raw_index([_raw_part([4096])]), "up to 4095"),
        (_raw_index([_raw_part([])]), "do not ascend"),
        (_raw_index([_raw_part([0], length=21)]), "of 21 or 21 bytes"),
        (_raw_index([_raw_part([0], length=262_166)], 1 << 20), "of 262166 or 262166 bytes"),
        (_raw_index([_raw_part([0], blocks=0)]), "with 0 or 0 blocks"),
        (_raw_index([_raw_part([0], blocks=65)]), "with 65 or 65 blocks"),
        (_raw_index([_raw_part([0]), _raw_part([1])]), "one pack twice"),
        (_raw_index([_raw_part(list(range(300)), length=262_000)], 64 << 20), "of more than 67108864 bytes"),
        (_raw_index([_raw_part(list(range(4000)), pack=n) for n in range(2)], 64 << 20), "over 4096 frames"),
    ],
)
def test_content_that_cannot_be_is_refused(content: bytes, message: str) -> None:
    """As only somebody with the keys could write it."""
    with pytest.raises(Corrupt, match=f"^index .*{message}"):
        decode_index(KEYS, *_sealed(content))


def test_content_made_by_hand_is_taken_where_it_is_right() -> None:
    index = decode_index(KEYS, *_sealed(_raw_index([_raw_part([0, 300]), _raw_part([7], pack=2)])))
    assert [list(part.numbers) for part in index.entries[0].parts] == [[0, 300], [7]]


def test_repacking_wins_by_name_and_not_by_order() -> None:
    before = Index((entry(1, {1: [0, 1, 2]}), entry(2, {2: [0]})))
    repacked = Index((entry(3, {1: [1], 2: [0]}),), (name(1),))
    for order in itertools.permutations([before, repacked, before]):
        index_map = IndexMap(order)
        assert index_map.entries.keys() == {name(2), name(3)}
        assert index_map.replaced == {name(1)}
        assert [found.object for found in index_map.objects_of(salt(1))] == [name(3)]
        assert {found.object for found in index_map.objects_of(salt(2))} == {name(2), name(3)}
        assert not index_map.objects_of(salt(9))


def _consistent(numbers: list[int], seed: int) -> list[Index]:
    """Indexes as they come to be: an object's entry is the same wherever it stands."""
    chance = random.Random(seed)
    entries = {number: entry(number, {number % 5: [0, 1], 5 + number % 3: [number]}) for number in range(12)}
    return [
        Index(
            tuple(entries[chance.randrange(12)] for _ in range(number)),
            tuple(name(chance.randrange(12)) for _ in range(chance.randrange(3))),
        )
        for number in numbers
    ]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 4), max_size=5), st.integers(0, 10**6), st.randoms())
def test_neither_order_nor_repetition_matters(numbers: list[int], seed: int, chance: random.Random) -> None:
    indexes = _consistent(numbers, seed)
    replaced = {replaced for index in indexes for replaced in index.replaces}
    entries = {e.object: e for index in indexes for e in index.entries if e.object not in replaced}
    shuffled = [*indexes, *indexes]
    chance.shuffle(shuffled)
    index_map = IndexMap(shuffled)
    assert index_map.entries == entries
    assert index_map.replaced == replaced
    for pack in map(salt, range(10)):
        expected = {name for name, found in entries.items() if found.part(pack)}
        objects = index_map.objects_of(pack)
        assert ({found.object for found in objects}, len(objects)) == (expected, len(expected))
