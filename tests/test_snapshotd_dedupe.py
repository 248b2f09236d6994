"""The cache of hashes: what it finds, what it must not find, and what is left of it after damage."""

import hashlib
from pathlib import Path
from random import Random

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.errors import NoSpace
from snapshotd.dedupe import Dedupe
from snapshotd.manifest import BlockRef


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def pack(number: int) -> bytes:
    return bytes([number]) * 16


def test_entries_survive_a_restart(tmp_path: Path) -> None:
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    dedupe.add(pack(1), [0, 5], [[digest(1), digest(2)], [digest(3)]])
    expected = {
        digest(1): BlockRef(pack(1), 0, 0),
        digest(2): BlockRef(pack(1), 0, 1),
        digest(3): BlockRef(pack(1), 5, 0),
    }
    asked = [digest(number) for number in range(5)]
    assert dedupe.find(asked) == expected
    dedupe.write()
    assert dedupe.find(asked) == expected
    dedupe.close()
    again = Dedupe(tmp_path / "hashes", b"mine")
    assert again.find(asked) == expected
    assert again.frames_of(pack(1)) == 0b100001
    again.close()


def test_a_file_of_another_repository_is_not_used(tmp_path: Path) -> None:
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    dedupe.add(pack(1), [0], [[digest(1)]])
    dedupe.close()
    other = Dedupe(tmp_path / "hashes", b"another")
    assert other.find([digest(1)]) == {}
    assert list(other.packs) == []
    other.close()


def test_a_file_that_is_none_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "hashes").write_bytes(b"no database" * 1000)
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    assert dedupe.find([digest(1)]) == {}
    dedupe.close()


def test_pages_that_cannot_be_read_are_misses(tmp_path: Path) -> None:
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    dedupe.add(pack(1), [0], [[digest(number) for number in range(64)]])
    dedupe.write()
    assert len(dedupe.find([digest(number) for number in range(64)])) == 64
    with (tmp_path / "hashes").open("r+b") as file:
        file.seek(2 * 4096)  # Behind the two pages that say where the trees begin.
        file.write(bytes((tmp_path / "hashes").stat().st_size - 2 * 4096))
    assert dedupe.find([digest(number) for number in range(64)]) == {}
    dedupe.close()
    again = Dedupe(tmp_path / "hashes", b"mine")
    assert not list(again.packs)
    again.add(pack(1), [0], [[digest(1)]])
    again.write()
    assert again.find([digest(1)]) == {digest(1): BlockRef(pack(1), 0, 0)}
    again.close()


def cut_to(file: Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)


def test_a_file_that_was_cut_off_finds_less_and_ends_nobody(tmp_path: Path) -> None:
    """Beyond the end of the file LMDB would read memory that is not there: SIGBUS, at every start anew."""
    dedupe = Dedupe(tmp_path / "whole", b"mine")
    hashes = [[digest(64 * frame + slot) for slot in range(64)] for frame in range(64)]
    dedupe.add(pack(1), range(64), hashes)
    dedupe.close()
    whole = (tmp_path / "whole").read_bytes()
    for size in (*range(0, len(whole), 37 * 1024), len(whole) - 1):
        (tmp_path / "hashes").write_bytes(whole)
        cut_to(tmp_path / "hashes", size)
        again = Dedupe(tmp_path / "hashes", b"mine")
        for frame, digests in enumerate(hashes):
            expected = {each: BlockRef(pack(1), frame, slot) for slot, each in enumerate(digests)}
            assert again.find(digests).items() <= expected.items()
        again.close()


@pytest.mark.parametrize("rotten", [b"1", b"x", b"4294967295"])
def test_a_number_that_was_given_twice_points_into_no_other_pack(tmp_path: Path, rotten: bytes) -> None:
    """One flipped bit in the count of numbers: the next pack gets that of another one, whose entries are still there.

    They would name the new pack's frames, and a snapshot would have another block's bytes.
    """
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    for number in (1, 2):
        dedupe.add(pack(number), [0], [[digest(number)]])
        dedupe.write()
    dedupe.forget([pack(2)])
    dedupe.close()
    with lmdb.open(str(tmp_path / "hashes"), subdir=False, max_dbs=2) as env, env.begin(write=True) as txn:
        assert txn.get(b"last-number") == b"2"
        txn.put(b"last-number", rotten)
    again = Dedupe(tmp_path / "hashes", b"mine")
    again.add(pack(3), [0], [[digest(3)]])
    again.write()
    expected = {digest(1): BlockRef(pack(1), 0, 0), digest(3): BlockRef(pack(3), 0, 0)}
    assert again.find([digest(1), digest(2), digest(3)]) == expected
    again.close()


def test_an_entry_of_another_size_is_a_miss(tmp_path: Path) -> None:
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    dedupe.add(pack(1), [0], [[digest(1), digest(2)]])
    dedupe.close()
    with lmdb.open(str(tmp_path / "hashes"), subdir=False, max_dbs=2) as env:
        entries, packs = env.open_db(b"entries"), env.open_db(b"packs")
        with env.begin(write=True) as txn:
            value = txn.get(digest(1), db=entries)
            assert value is not None
            txn.put(digest(1), value[:-1], db=entries)
            txn.put(b"odd", b"", db=packs)
            txn.put(b"longer than a number", b"x" * 40, db=packs)
    again = Dedupe(tmp_path / "hashes", b"mine")
    assert again.find([digest(1), digest(2)]) == {digest(2): BlockRef(pack(1), 0, 1)}
    again.close()


def test_forgotten_packs_are_not_found(tmp_path: Path) -> None:
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    for number in (1, 2):
        dedupe.add(pack(number), [0], [[digest(number)]])
    dedupe.write()
    assert dedupe.find([digest(1), digest(2)]).keys() == {digest(1), digest(2)}
    dedupe.forget([pack(2)])
    assert dedupe.find([digest(1), digest(2)]).keys() == {digest(1)}
    dedupe.add(pack(2), [7], [[digest(3)]])
    dedupe.write()
    assert dedupe.find([digest(2), digest(3)]) == {digest(3): BlockRef(pack(2), 7, 0)}
    dedupe.close()


def test_on_a_full_disk_it_finds_less_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotd.dedupe._MAP_SIZE", 1 << 16)
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    dedupe.add(pack(1), [0], [[digest(1)]])
    dedupe.write()
    frames = [[digest(64 * frame + slot) for slot in range(64)] for frame in range(1, 100)]
    dedupe.add(pack(2), range(99), frames)
    dedupe.write()
    assert dedupe.find([digest(1), *frames[5]]).keys() == {digest(1)}
    assert dedupe.find_recent(frames[5][0]) is None
    assert list(dedupe.packs) == [pack(1)]
    dedupe.forget([pack(1), pack(2)])
    assert dedupe.find([digest(1)]) == {}
    dedupe.close()


def test_to_open_one_that_is_there_writes_nothing(tmp_path: Path) -> None:
    """On a full disk a write would fail, and what is there would be given up for it."""
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    dedupe.add(pack(1), [0], [[digest(1)]])
    dedupe.close()
    before = (tmp_path / "hashes").read_bytes()
    again = Dedupe(tmp_path / "hashes", b"mine")
    assert again.find([digest(1)])
    again.close()
    assert (tmp_path / "hashes").read_bytes() == before


def test_where_no_file_can_be_made_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotd.dedupe._MAP_SIZE", 1 << 12)
    with pytest.raises(NoSpace, match="make room"):
        Dedupe(tmp_path / "hashes", b"mine")


def test_what_was_disowned_is_not_found(tmp_path: Path) -> None:
    dedupe = Dedupe(tmp_path / "hashes", b"mine")
    dedupe.claim(digest(1), BlockRef(pack(1), 0, 0))
    dedupe.claim(digest(2), BlockRef(pack(2), 0, 0))
    assert dedupe.find([digest(1)]) == {digest(1): BlockRef(pack(1), 0, 0)}
    dedupe.disown(pack(1), [digest(1), digest(2)])
    assert dedupe.find([digest(1), digest(2)]).keys() == {digest(2)}
    dedupe.close()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_flipped_bit_never_makes_a_wrong_reference(tmp_path_factory: object, seed: int) -> None:
    """Anywhere in the entries: each is found as it was, or not at all."""
    directory: Path = tmp_path_factory.mktemp("flip")  # type: ignore[attr-defined]
    dedupe = Dedupe(directory / "hashes", b"mine")
    hashes = [[digest(frame * 64 + slot) for slot in range(64)] for frame in range(8)]
    dedupe.add(pack(1), range(8), hashes)
    dedupe.close()
    data = bytearray((directory / "hashes").read_bytes())
    chance = Random(seed)
    victim = digest(chance.randrange(512))
    at = data.find(victim + (1).to_bytes(4, "little")) + chance.randrange(16, 27)  # in a leaf, with its value
    data[at] ^= 1 << chance.randrange(8)
    (directory / "hashes").write_bytes(data)
    again = Dedupe(directory / "hashes", b"mine")
    for frame, digests in enumerate(hashes):
        for slot, each in enumerate(digests):
            found = again.find([each])
            assert found == {each: BlockRef(pack(1), frame, slot)} or (each == victim and not found)
    again.close()
