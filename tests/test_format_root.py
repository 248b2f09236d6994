"""Roots and quarantines: whatever is in them comes back, and what they cost."""

import hashlib
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from blockstore.units import BLOCK_SIZE, GIB, MAX_VOLUME_SIZE, MIB, TIB
from snapshotd.compression import compress
from snapshotd.crypto import Kind
from snapshotd.quarantine import decode_quarantine, encode_quarantine
from snapshotd.root import MAX_TAGS, Root, Statistics, decode_root, encode_root
from tests.format_objects import KEYS, OTHER_SNAPSHOT, ROOT, SNAPSHOT, VOLUME, salt

_U64 = st.integers(0, 2**64 - 1)
_TIMES = st.integers(-(2**63), 2**63 - 1)
_TEXTS = st.text(max_size=60)
_ROOTS = st.builds(
    Root,
    snapshot=st.sampled_from([SNAPSHOT, OTHER_SNAPSHOT]),
    volume=st.sampled_from([VOLUME, ""]),
    volume_name=_TEXTS,
    size_bytes=st.integers(8 * 128 * MIB - 5000, MAX_VOLUME_SIZE),
    parent=_TEXTS,
    barrier=_TEXTS,
    generation=st.integers(0, 2**32 - 1),
    created_at_ms=_TIMES,
    sealed_at_ms=_TIMES,
    completed_at_ms=_TIMES,
    pause_us=_U64,
    description=_TEXTS,
    tags=st.dictionaries(_TEXTS, _TEXTS, max_size=4),
    statistics=st.builds(Statistics, _U64, _U64, _U64, _U64),
    shards=st.dictionaries(st.integers(0, 7), st.binary(min_size=32, max_size=32).map(bytes.hex)),
)


@given(_ROOTS)
def test_a_root_comes_back(root: Root) -> None:
    stored, digest = encode_root(KEYS, root, salt(1))
    assert digest == hashlib.sha256(stored).digest()
    assert decode_root(KEYS, root.snapshot, stored) == root
    assert decode_root(KEYS, root.snapshot, stored, digest) == root


def test_nothing_readable_leaves() -> None:
    """Only the id of the volume, which says nothing, is in clear."""
    stored, _ = encode_root(KEYS, ROOT, salt(1))
    for secret in (ROOT.volume_name, ROOT.description, ROOT.parent, "nightly", "owner", ROOT.barrier):
        assert secret.encode() not in stored
    assert VOLUME.encode() in stored


def test_a_root_is_bound_to_its_snapshot_and_its_volume() -> None:
    stored, _ = encode_root(KEYS, ROOT, salt(1))
    with pytest.raises(Corrupt, match=f"root of {OTHER_SNAPSHOT} fails its authentication"):
        decode_root(KEYS, OTHER_SNAPSHOT, stored)
    moved = stored.replace(VOLUME.encode(), b"vol-0000000000000000a")
    assert moved != stored
    with pytest.raises(Corrupt, match="authentication"):
        decode_root(KEYS, SNAPSHOT, moved)


def test_an_older_root_in_its_place_shows_against_the_catalog() -> None:
    older, _ = encode_root(KEYS, ROOT, salt(1))
    _, digest = encode_root(KEYS, replace(ROOT, description="retried"), salt(2))
    with pytest.raises(Corrupt, match="not the one that the catalog names"):
        decode_root(KEYS, SNAPSHOT, older, digest)


def test_a_root_grows_with_the_data_and_not_with_the_volume() -> None:
    """1 TiB that holds 1 GiB, in one place; and a full one."""
    chance = random.Random(1)
    names = {number: chance.randbytes(32).hex() for number in range(TIB // (128 * MIB))}
    small, _ = encode_root(
        KEYS, replace(ROOT, size_bytes=TIB, shards={n: names[n] for n in range(4000, 4008)}), salt(1)
    )
    assert len(small) < 1000
    same, _ = encode_root(KEYS, replace(ROOT, size_bytes=GIB, shards={n: names[n] for n in range(8)}), salt(2))
    assert abs(len(small) - len(same)) < 20
    full, _ = encode_root(KEYS, replace(ROOT, size_bytes=TIB, shards=names), salt(3))
    assert len(full) < 33.5 * len(names)


def test_the_blocks_of_a_volume_that_ends_within_one() -> None:
    assert replace(ROOT, size_bytes=3 * BLOCK_SIZE + 1).blocks == 4
    assert replace(ROOT, size_bytes=3 * BLOCK_SIZE).blocks == 3


@pytest.mark.parametrize(
    "wrong",
    [
        replace(ROOT, size_bytes=MAX_VOLUME_SIZE + 1),
        replace(ROOT, size_bytes=-1),
        replace(ROOT, tags={str(n): "" for n in range(MAX_TAGS + 1)}),
        replace(ROOT, shards={8192: "ab" * 32}),
        replace(ROOT, shards={-1: "ab" * 32}),
        replace(ROOT, shards={0: "ab"}),
        replace(ROOT, shards={0: "AB" * 32}),
        replace(ROOT, description="x" * 65_536),
    ],
)
def test_what_no_reader_takes_is_not_written(wrong: Root) -> None:
    with pytest.raises(ValueError, match=r"root of|shards|text|no name of an object"):
        encode_root(KEYS, wrong, salt(1))


def _content(size_bytes: int = TIB, tags: bytes = b"\0\0", shards: bytes = bytes(4)) -> bytes:
    texts = b"\0\0" * 3
    numbers = bytes(4 + 3 * 8 + 8)
    return size_bytes.to_bytes(8, "little") + texts + numbers + b"\0\0" + tags + bytes(32) + shards


def _shards(*numbers: int) -> bytes:
    planes = b"".join(bytes(number >> 8 * plane & 255 for number in numbers) for plane in range(4))
    return len(numbers).to_bytes(4, "little") + planes + bytes(32 * len(numbers))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends at byte 0"),
        (_content() + b"x", "1 bytes too many"),
        (_content(MAX_VOLUME_SIZE + 1), "above the limit"),
        (_content(tags=(MAX_TAGS + 1).to_bytes(2, "little")), f"count of {MAX_TAGS + 1}"),
        (_content(tags=b"\x02\0" + b"\x01\0a\0\0" * 2), "a tag twice"),
        (_content(shards=(8193).to_bytes(4, "little")), "count of 8193"),
        (_content(shards=_shards(8192)), "beyond 8192"),
        (_content(shards=_shards(2, 1)), "do not ascend"),
        (_content(shards=_shards(2, 2)), "do not ascend"),
        (_content(shards=_shards(2)[:-1]), "ends at byte"),
    ],
)
def test_content_that_cannot_be_is_refused(content: bytes, message: str) -> None:
    """As only somebody with the keys could write it."""
    stored = KEYS.seal(Kind.ROOT, SNAPSHOT.encode(), compress(content), salt(1))
    with pytest.raises(Corrupt, match=f"^root of {SNAPSHOT} .*{message}"):
        decode_root(KEYS, SNAPSHOT, stored)


def test_content_made_by_hand_is_taken_where_it_is_right() -> None:
    content = _content(tags=b"\x01\0" + b"\x01\0a\0\0", shards=_shards(1, 8191))
    stored = KEYS.seal(Kind.ROOT, SNAPSHOT.encode(), compress(content), salt(1))
    root = decode_root(KEYS, SNAPSHOT, stored)
    assert (root.volume, root.size_bytes, root.tags, [*root.shards]) == ("", TIB, {"a": ""}, [1, 8191])


@pytest.mark.parametrize("volume", [b"vol-123", b"snap-0123456789abcdef0", b"\xff" * 21, b"vol-0011223344556677/"])
def test_a_volume_that_is_none_is_refused(volume: bytes) -> None:
    stored = KEYS.seal(Kind.ROOT, SNAPSHOT.encode(), compress(_content()), salt(1), volume)
    with pytest.raises(Corrupt, match="which is no id"):
        decode_root(KEYS, SNAPSHOT, stored)


@given(st.frozensets(st.binary(min_size=16, max_size=16), max_size=50), _U64)
def test_a_quarantine_comes_back(packs: frozenset[bytes], number: int) -> None:
    stored = encode_quarantine(KEYS, number, packs, salt(1))
    assert decode_quarantine(KEYS, number, stored) == packs


def test_a_quarantine_is_bound_to_its_number() -> None:
    stored = encode_quarantine(KEYS, 5, [salt(1)], salt(2))
    with pytest.raises(Corrupt, match="quarantine 6 fails its authentication"):
        decode_quarantine(KEYS, 6, stored)


def test_a_quarantine_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="of 16 bytes"):
        encode_quarantine(KEYS, 5, [bytes(15)], salt(2))
    for content in (b"\x01\0\0\0", b"\0\0\0\0x", b"\x01\0\x40\0"):
        stored = KEYS.seal(Kind.QUARANTINE, (5).to_bytes(8, "little"), compress(content), salt(1))
        with pytest.raises(Corrupt, match=r"^quarantine 5 "):
            decode_quarantine(KEYS, 5, stored)
