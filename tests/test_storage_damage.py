"""What rots on disk is Corrupt, never read as something else; peers mend it; the offline check finds it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockstore.errors import CairnError, Conflict, Corrupt, NotFound
from blockstore.log import Filling, LogImage
from blockstore.storage.check import check_node, check_replica
from blockstore.storage.keys import (
    ALL_BITS,
    ExtentRow,
    encode_bits,
    extent_key,
    number_key,
    version_key,
    zero_value,
)
from blockstore.storage.meta import Meta, Pin, Tombstone
from blockstore.storage.node_store import NodeStore
from blockstore.storage.reads import CorruptBlocks
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.tables import FILE_NAME, Tables, Writing
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, Generation, Sequence
from tests.storage_model import EPOCH, Log, address, apply, block, new_store, position, seal, trim, write

NUMBER = 5
FIRST, SECOND = Generation(1), Generation(2)


def make(directory: Path) -> Log:
    """Block 5 in two generations, a block that was trimmed over a snapshot, and neighbours."""
    store, log = new_store(directory), Log()
    apply(store, log, [log.record(write(4, block(4), block(5), block(6))), log.record(seal(b"snap"))])
    apply(store, log, [log.record(write(5, block(50)), trim(6, 1)), log.record(write(700, block(7)))])
    store.close()
    return log


def flip(path: Path, needle: bytes, offset: int, bit: int = 0) -> None:
    """Change one bit of every place of the file that holds `needle`: older pages may hold it as well."""
    content = bytearray(path.read_bytes())
    at = content.find(needle)
    assert at >= 0, "the bytes to damage are not in the file"
    while at >= 0:
        content[at + offset] ^= 1 << bit
        at = content.find(needle, at + len(needle))
    path.write_bytes(content)


def problems(directory: Path) -> list[str]:
    return [problem.what for problem in check_replica(directory / FILE_NAME).problems]


def test_what_is_whole_has_no_problems_and_a_summary(tmp_path: Path) -> None:
    log = make(tmp_path)
    report = check_replica(tmp_path / FILE_NAME)
    assert report.problems == []
    (summary,) = report.replicas
    assert (summary.address, summary.applied, summary.epoch, summary.whole) == (address(), position(4), EPOCH, True)
    assert (summary.blocks, summary.generations) == (5, (FIRST,))
    store = ReplicaStore.open(tmp_path)
    assert summary.digest == store.digest()
    assert summary.digests == {FIRST: store.digest(FIRST)}
    assert store.read(0, 8) == log.content(0, 8)


@pytest.mark.parametrize("offset", [0, 100, 4079])
def test_a_flipped_bit_in_a_block_is_corrupt_until_a_peer_mends_it(tmp_path: Path, offset: int) -> None:
    log = make(tmp_path / "bad")
    make(tmp_path / "good")
    flip(tmp_path / "bad" / FILE_NAME, block(50)[:4080], offset)
    bad, good = ReplicaStore.open(tmp_path / "bad"), ReplicaStore.open(tmp_path / "good")
    for start, count in ((5, 1), (0, 8), (4, 2)):
        with pytest.raises(CorruptBlocks) as caught:
            bad.read(start, count)
        assert caught.value.versions == ((NUMBER, SECOND, Sequence(3)),)
    assert bad.sealed.read(FIRST, 0, 8) == log.content(0, 8, FIRST)
    for call in (bad.digest, lambda: bad.copy_extent(0)):
        with pytest.raises(CorruptBlocks):
            call()
    (version,) = caught.value.versions
    assert version.generation is not None
    assert version.sequence is not None
    assert bad.repairs.version(NUMBER, version.generation, version.sequence) is None
    mended = good.repairs.version(NUMBER, version.generation, version.sequence)
    assert mended == block(50)
    assert not bad.repairs.mend(NUMBER, version.generation, Sequence(2), mended)
    assert bad.repairs.mend(NUMBER, version.generation, version.sequence, mended)
    assert not bad.repairs.mend(NUMBER, version.generation, version.sequence, mended)
    assert bad.read(0, 8) == log.content(0, 8)
    bad.close()
    assert problems(tmp_path / "bad") == []


@pytest.mark.parametrize("offset", [0, 7, 8, 15, 16, 17, 32])
def test_a_flipped_bit_in_an_index_entry_is_corrupt(tmp_path: Path, offset: int) -> None:
    log = make(tmp_path)
    key = version_key(NUMBER, SECOND)
    flip(tmp_path / FILE_NAME, key + Sequence(3).to_bytes(8, "little"), len(key) + offset)
    store = ReplicaStore.open(tmp_path)
    for start, count in ((5, 1), (4, 4)):
        with pytest.raises(CorruptBlocks) as caught:
            store.read(start, count)
    assert store.read(4, 1) == block(4)
    ((_, generation, sequence),) = caught.value.versions
    assert generation == SECOND
    assert sequence is not None
    # A bit in the sequence leaves nothing to recognize the version by; all else is mended.
    assert not store.repairs.mend(NUMBER, SECOND, sequence, block(51))
    assert store.repairs.mend(NUMBER, SECOND, Sequence(3), block(50)) == (offset > 7)
    if offset > 7:
        assert store.read(0, 8) == log.content(0, 8)
    store.close()
    assert bool(problems(tmp_path)) == (offset <= 7)


@pytest.mark.parametrize("offset", [8, 16])
def test_a_damaged_zero_entry_is_corrupt_and_mended(tmp_path: Path, offset: int) -> None:
    log = make(tmp_path)
    key = version_key(6, SECOND)
    flip(tmp_path / FILE_NAME, key + Sequence(3).to_bytes(8, "little"), len(key) + offset)
    store = ReplicaStore.open(tmp_path)
    with pytest.raises(CorruptBlocks):
        store.read(6, 1)
    assert not store.repairs.mend(6, SECOND, Sequence(3), block(6))
    assert store.repairs.mend(6, SECOND, Sequence(3), bytes(BLOCK_SIZE))
    assert store.read(0, 8) == log.content(0, 8)
    store.close()
    assert problems(tmp_path) == []


@pytest.mark.parametrize("byte", range(5, 12))
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_key_never_reads_as_zeroes(tmp_path: Path, byte: int, bit: int) -> None:
    make(tmp_path)
    key = version_key(700, SECOND)
    flip(tmp_path / FILE_NAME, key, byte, bit)
    store = ReplicaStore.open(tmp_path)
    for start, count in ((700, 1), (690, 20)):
        with pytest.raises(Corrupt):
            store.read(start, count)
    store.close()
    assert problems(tmp_path)


def test_a_page_of_rubbish_is_corrupt_and_no_crash(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    for page in range(2, len(content) // BLOCK_SIZE):
        content[page * BLOCK_SIZE : page * BLOCK_SIZE + 64] = bytes(range(64))
    path.write_bytes(content)
    assert problems(tmp_path)
    with pytest.raises(Corrupt):
        ReplicaStore.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"rubbish" * 5000])
def test_a_file_that_is_no_table_is_found(tmp_path: Path, content: bytes) -> None:
    make(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(content)
    assert problems(tmp_path)


def test_missing_tables_are_found(tmp_path: Path) -> None:
    assert problems(tmp_path) == ["the tables are missing"]


Plant = Callable[[Tables, Writing], object]


def _row(generation: int, extent: int, sequence: int, bits: int) -> Plant:
    key = extent_key(generation, extent)
    return lambda t, txn: txn.put(key, ExtentRow(Sequence(sequence), bits).encode(key), db=t.extents)


def _present(extent: int, bits: int) -> Plant:
    key = number_key(extent)
    return lambda t, txn: txn.put(key, encode_bits(key, bits), db=t.present)


def _meta(name: bytes, content: bytes) -> Plant:
    return lambda t, txn: Meta(t, txn).put(name, content)


PLANTS: dict[str, tuple[Plant, str]] = {
    "no data": (lambda t, txn: txn.delete(version_key(5, 1), db=t.data), "no data"),
    "no index": (lambda t, txn: txn.delete(version_key(5, 1), db=t.index), "data has"),
    "data of a zero": (lambda t, txn: txn.put(version_key(6, 2), bytes(4080), db=t.data), "yet has data"),
    "short data": (lambda t, txn: txn.put(version_key(5, 1), b"short", db=t.data), "fails its checksum"),
    "block moved": (
        lambda t, txn: txn.put(version_key(4, 1), txn.get(version_key(5, 1), db=t.data) or b"", db=t.data),
        "fails its checksum",
    ),
    "bit too few": (_present(0, 0b0110000), "bit in present is clear"),
    "bit too many": (_present(0, 0b1111110000), "bit in present is set"),
    "present of nothing": (_present(9, 1), "bit in present is set"),
    "present damaged": (lambda t, txn: txn.put(number_key(0), bytes(40), db=t.present), "fails its checksum"),
    "no row": (lambda t, txn: txn.delete(extent_key(2, 0), db=t.extents), "no row of extents"),
    "row without bit": (_row(2, 0, 3, 0b1000000), "no row of extents"),
    "row too old": (_row(1, 0, 0, ALL_BITS), "above that of its row"),
    "row too new": (_row(2, 0, 99, ALL_BITS), "above what is applied"),
    "row of no generation": (_row(9, 0, 1, 1), "does not exist"),
    "row damaged": (lambda t, txn: txn.put(extent_key(2, 0), bytes(48), db=t.extents), "fails its checksum"),
    "newest gone": (
        lambda t, txn: [txn.delete(version_key(5, 2), db=table) for table in (t.index, t.data)],
        "only older entries",
    ),
    "entry too new": (
        lambda t, txn: txn.put(version_key(6, 2), zero_value(6, 2, 99), db=t.index),
        "above what is applied",
    ),
    "entry of no generation": (
        lambda t, txn: txn.put(version_key(6, 7), zero_value(6, 7, 3), db=t.index),
        "no row of extents",
    ),
    "entry beyond the volume": (
        lambda t, txn: txn.put(version_key(1 << 40, 2), zero_value(1 << 40, 2, 3), db=t.index),
        "beyond the largest volume",
    ),
    "pin of nothing": (lambda t, txn: Meta(t, txn).put_pin(Pin(Generation(9), b"x", Sequence(1), True)), "pinned by"),
    "sealed by nothing": (
        lambda t, txn: Meta(t, txn).put_sealed(Meta(t, txn).sealed()[0]._replace(generation=Generation(8))),
        "out of order",
    ),
    "tombstone": (
        lambda t, txn: Meta(t, txn).put_tombstones([Tombstone(0, 1, SECOND, Sequence(1))]),
        "as if it filled",
    ),
    "copied above applied": (_meta(b"copied", bytes(15) + b"\x01"), "was copied at"),
    "format": (_meta(b"format", b"cairn tables 9"), "format"),
    "address": (_meta(b"address", b"nonsense"), "address"),
    "no position": (lambda t, txn: Meta(t, txn).delete(b"applied"), "applied"),
    "meta damaged": (lambda t, txn: txn.put(b"applied", bytes(24), db=t.meta), "fails its checksum"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_the_check_finds_what_is_planted(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    plant, expected = PLANTS[name]
    tables = Tables(tmp_path / FILE_NAME, create=False)
    tables.change(lambda transaction: plant(tables, transaction))
    tables.close()
    found = problems(tmp_path)
    assert any(expected in what for what in found), found


@pytest.mark.parametrize(
    ("name", "starts"), [("row damaged", True), ("present damaged", True), ("meta damaged", False)]
)
def test_what_a_running_node_repairs_needs_no_person(tmp_path: Path, name: str, starts: bool) -> None:
    make(tmp_path)
    tables = Tables(tmp_path / FILE_NAME, create=False)
    for plant in ("present of nothing", name):
        tables.change(lambda transaction, plant=plant: PLANTS[plant][0](tables, transaction))  # type: ignore[misc]
    tables.close()
    advice = {problem.what_to_do for problem in check_replica(tmp_path / FILE_NAME).problems}
    assert [each.split(",")[0] for each in advice] == [
        "start the node" if starts else "if other replicas of the volume are whole"
    ]


@pytest.mark.parametrize("name", ["no data", "newest gone", "bit too few", "bit too many", "row damaged"])
def test_damage_is_not_copied_nor_passed_over_by_scrub(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    tables = Tables(tmp_path / FILE_NAME, create=False)
    tables.change(lambda transaction: PLANTS[name][0](tables, transaction))
    tables.close()
    with pytest.raises(Corrupt):
        ReplicaStore.open(tmp_path).copy_extent(0)


def test_the_check_finds_a_gap_in_the_tail(tmp_path: Path) -> None:
    log = make(tmp_path)
    log.record(trim(0, 1))
    store = ReplicaStore.open(tmp_path)
    store.checkpoint(LogImage(position(4), EPOCH, 1, None, (log.record(trim(1, 1)),), SECOND), 0)
    store.close()
    assert any("does not follow" in what for what in problems(tmp_path))


def test_many_problems_are_counted(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    apply(store, log, [log.record(write(0, *[block(i) for i in range(50)]))])
    store.close()
    tables = Tables(tmp_path / FILE_NAME, create=False)
    tables.change(lambda transaction: transaction.drop(tables.data, delete=False))
    tables.close()
    found = problems(tmp_path)
    assert len(found) == 21
    assert found[-1] == "and 31 more"


def test_a_node_is_checked_whole_and_only_while_it_is_stopped(tmp_path: Path) -> None:
    node = NodeStore.open(tmp_path)
    for digit in (1, 2):
        store, log = node.create_replica(address(digit), LogImage()), Log()
        apply(store, log, [log.record(write(4, block(4)))])
        store.close()
    with pytest.raises(Conflict):
        check_node(tmp_path)
    node.close()
    report = check_node(tmp_path)
    assert report.problems == []
    assert [summary.address.replica for summary in report.replicas] == [address(1).replica, address(2).replica]
    flip(tmp_path / "replicas" / address(2).replica / FILE_NAME, block(4)[:4080], 0)
    report = check_node(tmp_path)
    assert [problem.where.parent.name for problem in report.problems] == [address(2).replica]


def test_tables_or_a_journal_that_is_missing_is_told(tmp_path: Path) -> None:
    node = NodeStore.open(tmp_path)
    node.create_replica(address(1), LogImage()).close()
    node.close()
    (tmp_path / "replicas" / address(1).replica / FILE_NAME).unlink()
    (tmp_path / "journal").rmdir()
    assert [problem.where.name for problem in check_node(tmp_path).problems] == [FILE_NAME, "journal"]


def test_what_is_no_nodes_data_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file", tmp_path):
        with pytest.raises(NotFound, match="no node's data"):
            check_node(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_peer_is_no_source_of_copies(tmp_path: Path) -> None:
    log = make(tmp_path / "bad")
    flip(tmp_path / "bad" / FILE_NAME, block(50)[:4080], 9)
    bad = ReplicaStore.open(tmp_path / "bad")
    with pytest.raises(CairnError):
        bad.copy_extent(0)
    assert bad.copy_extent(700 // EXTENT_BLOCKS)
    assert log.sequence == 4


def test_a_trim_that_came_late_leaves_later_generations_alone(tmp_path: Path) -> None:
    """A copy ahead of the replica's own log: what the log then brings is older than what is there."""
    source, target, log = new_store(tmp_path / "a", 1), new_store(tmp_path / "b", 2), Log()
    filling = Filling(position(0), position(0), Sequence(0))
    records = [
        log.record(write(3, block(3))),
        log.record(trim(3, 1)),
        log.record(seal()),
        log.record(write(3, block(9))),
    ]
    apply(source, log, records)
    target.commit(records[:1])
    image = LogImage(position(1), EPOCH, 1, filling)
    target.checkpoint(image, 0)
    stated = position(4)
    target.write_copy(source.delta_meta(), [source.copy_extent(0)], stated, image)
    assert target.image.generation == SECOND
    target.commit(records[1:3])
    target.checkpoint(LogImage(position(3), EPOCH, 1, filling), 0)
    assert target.read(3, 1) == block(9)
    target.commit(records[3:])
    target.checkpoint(log.image(), 0)
    assert target.digest() == source.digest()


COPIES_ALL = LogImage(position(4), EPOCH, 1, Filling(position(5), position(4), Sequence(0)), (), SECOND)
FOUND_BY: dict[str, tuple[str, Callable[[ReplicaStore, list[list[bytes]]], object]]] = {
    "a checkpoint": ("present damaged", lambda bad, _: bad.checkpoint(replace(COPIES_ALL, applied=position(5)), 0)),
    "a copy": ("row damaged", lambda bad, copies: bad.write_copy(None, copies, position(5), COPIES_ALL)),
    "the list at its end": ("row damaged", lambda bad, _: bad.held_extents()),
}


@pytest.mark.parametrize("by", FOUND_BY)
def test_damaged_tables_are_given_up_when_a_copy_of_everything_begins(tmp_path: Path, by: str) -> None:
    name, find = FOUND_BY[by]
    log = make(tmp_path / "good")
    make(tmp_path / "bad")
    good, bad = ReplicaStore.open(tmp_path / "good"), ReplicaStore.open(tmp_path / "bad")
    bad._tables.change(lambda transaction: PLANTS[name][0](bad._tables, transaction))
    late = log.record(write(6, block(60), block(61)), trim(5, 1))
    for store in (good, bad):
        store.commit([late])
    good.checkpoint(log.image(), 0)
    copies = [good.copy_extent(0), good.copy_extent(700 // EXTENT_BLOCKS)]
    with pytest.raises(Corrupt):
        find(bad, copies)
    assert bad.damage
    assert bad.image.applied == position(4)
    bad.write_copy(good.delta_meta(), [], position(5), COPIES_ALL)
    assert bad.damage == ""
    bad.write_copy(None, copies, position(5), COPIES_ALL)
    bad.checkpoint(log.image(), 0)
    assert bad.digest() == good.digest()
    assert bad.digest(FIRST) == good.digest(FIRST)
    bad.close()
    assert problems(tmp_path / "bad") == []
    assert {path.name for path in (tmp_path / "bad").iterdir()} == {FILE_NAME, FILE_NAME + "-lock"}


@pytest.mark.parametrize("count", [1, 8])
def test_changes_whose_rows_are_lost_do_not_show_what_was_there_before(tmp_path: Path, count: int) -> None:
    """A snapshot's content goes to object storage for good: `extents` says that there were changes."""
    store, log = new_store(tmp_path), Log()
    blocks = [block(number) for number in range(2 * count)]
    records = [log.record(write(0, *blocks[:count])), log.record(seal(b"snap-a"))]
    records += [log.record(write(0, *blocks[count:])), log.record(seal(b"snap-b"))]
    apply(store, log, records)
    assert store.sealed.read(Generation(2), 0, count) == b"".join(blocks[count:])

    def lose(transaction: Writing) -> None:
        for table in (store._tables.index, store._tables.data):
            assert all(transaction.delete(version_key(number, 2), db=table) for number in range(count))

    store._tables.change(lose)
    with pytest.raises(Corrupt):
        store.sealed.read(Generation(2), 0, count)


def test_a_trim_that_was_hidden_from_a_copy_is_found_before_the_replica_is_whole(tmp_path: Path) -> None:
    """A copy looks only at trims behind its position; one whose key was damaged stands elsewhere."""
    source, target, log = new_store(tmp_path / "a", 1), new_store(tmp_path / "b", 2), Log()
    apply(source, log, [log.record(write(3, block(3)))])
    copy = source.copy_extent(0)
    filling = LogImage(position(2), EPOCH, 1, Filling(position(1), position(1), Sequence(0)))
    target.commit([*log.records, log.record(trim(3, 1))])
    target.checkpoint(filling, 0)
    tables = target._tables
    name = b"tombstone/" + number_key(2) + number_key(3)

    def flip_key(transaction: Writing) -> None:
        value = transaction.get(name, db=tables.meta)
        assert value is not None
        transaction.delete(name, db=tables.meta)
        transaction.put(b"tombstone/" + number_key(0) + number_key(3), value, db=tables.meta)

    tables.change(flip_key)
    target.write_copy(None, [copy], position(1), filling)
    with pytest.raises(Corrupt):
        target.checkpoint(log.image(), 0)
    assert target.image.filling is not None


def test_damaged_tables_stay_where_the_copy_is_older_than_what_they_hold(tmp_path: Path) -> None:
    make(tmp_path / "bad")
    good, log = new_store(tmp_path / "good", 2), Log()
    apply(good, log, [log.record(write(4, block(4), block(5), block(6)))])
    bad = ReplicaStore.open(tmp_path / "bad")
    bad.note_damage(Corrupt("a row fails its checksum"))
    filling = LogImage(position(4), EPOCH, 1, Filling(position(4), position(1), Sequence(0)), (), SECOND)
    bad.write_copy(good.delta_meta(), [], position(1), filling)
    assert bad.damage
    assert bad.read(5, 1) == block(50)


def test_tables_that_cannot_be_used_are_not_left_open(tmp_path: Path) -> None:
    log = make(tmp_path)
    good = (tmp_path / FILE_NAME).read_bytes()
    tables = Tables(tmp_path / FILE_NAME, create=False)
    tables.change(lambda transaction: PLANTS["address"][0](tables, transaction))
    tables.close()
    for _ in range(2):
        with pytest.raises(Corrupt):
            ReplicaStore.open(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(good)
    assert ReplicaStore.open(tmp_path).read(0, 8) == log.content(0, 8)
