"""A replica whose absent blocks come from somewhere else: what counts as absent, and until when."""

from pathlib import Path
from typing import Any

import pytest

from blockstore.log import Filling, LogImage
from blockstore.storage import apply as apply_module
from blockstore.storage import memtable
from blockstore.storage.check import check_replica
from blockstore.storage.copies import decode_meta
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.tables import FILE_NAME
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MAX_BLOCKS, Sequence
from tests.storage_model import (
    EPOCH,
    ZERO,
    Log,
    apply,
    block,
    discard,
    fill,
    hydrated,
    new_store,
    position,
    seal,
    trim,
    unpin,
    write,
    zero,
)

SOURCE = b"snap-1"


@pytest.fixture(autouse=True, params=[1, memtable.RUN_BLOCKS], ids=["runs", "entries"])
def kept_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed lies in memory as runs, however short, or block by block."""
    monkeypatch.setattr(memtable, "RUN_BLOCKS", request.param)


def restored(directory: Path) -> tuple[ReplicaStore, Log]:
    return new_store(directory, source=SOURCE), Log()


def test_only_what_has_no_entry_is_absent_in_memory_as_in_the_tables(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    store.commit([log.record(write(1, block(1)), trim(3, 1), fill(5, block(5)), zero(6, 1))])
    for _ in range(2):
        content, absent = store.read_with_absent(0, 9)
        assert content == ZERO + block(1) + 3 * ZERO + block(5) + 3 * ZERO
        assert absent == [(0, 1), (2, 1), (4, 1), (7, 2)]
        assert store.read_with_absent(1, 1) == (block(1), [])
        assert store.read_with_absent(2, 1) == (ZERO, [(2, 1)])
        store.checkpoint(log.image(), 0)


def test_a_fill_in_memory_over_a_trim_in_the_tables_is_neither_shown_nor_absent(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    apply(store, log, [log.record(trim(2, 1))])
    store.commit([log.record(fill(1, block(1), block(2)))])
    assert store.read_with_absent(0, 4) == (ZERO + block(1) + 2 * ZERO, [(0, 1), (3, 1)])


def test_absence_means_the_source_until_hydrated_is_committed(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    assert store.has_source
    store.commit([log.record(hydrated())])
    assert not store.has_source
    store.close()

    store = ReplicaStore.open(tmp_path)
    assert store.has_source  # the journal will bring it again
    store.commit(log.records)
    store.checkpoint(log.image(), 0)
    assert not store.has_source
    store.close()

    store = ReplicaStore.open(tmp_path)
    assert not store.has_source
    assert (store.origin, store.sealed.describe().source) == (SOURCE, b"")


def test_what_was_committed_and_given_up_ends_no_source(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    store.commit([log.record(hydrated())])
    store.reset()
    assert store.has_source


def test_a_checkpoint_that_stops_below_hydrated_does_not_bring_the_source_back(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    store.commit([log.record(trim(0, 1)), log.record(hydrated())])
    store.checkpoint(log.image(1), 0)
    assert not store.has_source


def entries(store: ReplicaStore) -> int:
    with store._tables.reading() as transaction:
        count: int = transaction.stat(store._tables.index)["entries"]
        return count


def test_a_discard_costs_what_is_there(tmp_path: Path) -> None:
    """Where the source maps nothing, absence means zeroes: mkfs on a restored volume that was grown."""
    store, log = restored(tmp_path)
    apply(store, log, [log.record(discard(0, (1 << 32) - 1)), log.record(trim(7, 1))])
    assert entries(store) == 1
    apply(store, log, [log.record(write(5, block(1)), write(MAX_BLOCKS - 1, block(2)))])
    store.commit([log.record(discard(0, (1 << 32) - 1))])
    for _ in range(2):
        assert store.read(5, 1) == ZERO
        assert store.read(MAX_BLOCKS - 1, 1) == block(2)
        store.checkpoint(log.image(), 0)
    assert entries(store) == 1


def test_a_discard_leaves_a_zero_only_over_an_older_version(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    apply(store, log, [log.record(write(1, block(1))), log.record(seal(b"snap-2"))])
    apply(store, log, [log.record(discard(0, 4))])
    assert store.read_with_absent(0, 4) == (4 * ZERO, [(0, 1), (2, 2)])
    assert store.sealed.read(log.records[0].generation, 1, 1) == block(1)
    assert [(extent, bits) for extent, bits in store.sealed.changes(2, (1 << 32) - 1, 0, 9)] == [(0, 0b10)]


def test_a_zero_stays_in_a_merge_while_absence_means_something(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    apply(store, log, [log.record(trim(1, 1)), log.record(seal(b"s")), log.record(unpin(1, b"s"))])
    assert store.merge()
    assert store.read_with_absent(0, 2) == (2 * ZERO, [(0, 1)])


def fill_anew(store: ReplicaStore, log: Log, base: int) -> LogImage:
    filling = Filling(position(base), position(base), Sequence(0))
    image = LogImage(position(base), EPOCH, 1, filling, (), log.image(base).generation)
    store.reset()
    store.checkpoint(image, 0)
    return image


def test_what_was_trimmed_before_the_source_was_known_stays_trimmed(tmp_path: Path) -> None:
    """A replica that was made anew hears of its source with the copy; the live stream begins before that."""
    for operation, entry in ((trim(600, 2), True), (discard(600, 2), False)):
        name = operation.kind.name
        source, log = restored(tmp_path / name / "source")
        apply(source, log, [log.record(write(0, block(1)))])
        target = new_store(tmp_path / name / "target", 2)
        image = fill_anew(target, log, 1)
        record = log.record(operation)
        target.commit([record])
        image = LogImage(position(2), EPOCH, 1, image.filling, (), image.generation, position(1))
        target.checkpoint(image, 0)
        target.write_copy(source.delta_meta(), [], position(1), image)
        target.write_copy(None, [source.copy_extent(0)], position(1), image)
        source.commit([record])
        source.checkpoint(log.image(), 0)
        target.checkpoint(log.image(), 0)
        assert target.has_source
        for store in (source, target):
            content, absent = store.read_with_absent(600, 2)
            assert content == 2 * ZERO
            assert (not absent) == entry, (name, store.address)
        assert set(target.delta_extents(Sequence(1))) == set(source.delta_extents(Sequence(1)))


def test_a_source_that_ended_at_the_peer_ends_with_the_copy(tmp_path: Path) -> None:
    """The replica knows of it from its creation, and missed the record that ended it."""
    source, log = restored(tmp_path / "source")
    apply(source, log, [log.record(fill(1, block(1))), log.record(hydrated())])
    target, _ = restored(tmp_path / "target")
    image = fill_anew(target, log, 2)
    target.write_copy(source.delta_meta(), [source.copy_extent(0)], position(2), image)
    assert not target.has_source
    target.checkpoint(log.image(), 0)
    assert target.read_with_absent(0, 2) == (ZERO + block(1), [(0, 1)])


def test_hydrated_in_the_live_stream_outlives_an_older_copy(tmp_path: Path) -> None:
    source, log = restored(tmp_path / "source")
    apply(source, log, [log.record(fill(1, block(1)))])
    target, _ = restored(tmp_path / "target")
    image = fill_anew(target, log, 1)
    target.commit([log.record(hydrated())])
    image = LogImage(position(2), EPOCH, 1, image.filling, (), image.generation, position(1))
    target.write_copy(source.delta_meta(), [source.copy_extent(0)], position(1), image)
    assert decode_meta(source.delta_meta()).source == SOURCE
    assert not target.has_source
    target.checkpoint(log.image(), 0)
    target.close()
    assert not ReplicaStore.open(tmp_path / "target").has_source


def test_a_copy_from_before_a_discard_does_not_bring_back_what_it_took(tmp_path: Path) -> None:
    source, log = restored(tmp_path / "source")
    apply(source, log, [log.record(write(3, block(1), block(2)))])
    target, _ = restored(tmp_path / "target")
    image = fill_anew(target, log, 1)
    target.commit([log.record(discard(3, 1))])
    target.checkpoint(LogImage(position(2), EPOCH, 1, image.filling, (), image.generation), 0)
    image = LogImage(position(2), EPOCH, 1, image.filling, (), image.generation, position(1))
    target.write_copy(source.delta_meta(), [source.copy_extent(0)], position(1), image)
    target.checkpoint(log.image(), 0)
    assert target.read_with_absent(2, 4) == (2 * ZERO + block(2) + ZERO, [(2, 2), (5, 1)])


@pytest.mark.parametrize("source_known", [True, False])
def test_a_fill_that_comes_after_a_copy_brings_nothing_back_that_a_merge_took_away(
    tmp_path: Path, source_known: bool
) -> None:
    """The peer was hydrated and merged before the copy; the live stream with fill and end lags behind it."""
    source, log = restored(tmp_path / "source")
    apply(source, log, [log.record(trim(1, 1)), log.record(seal()), log.record(write(9, block(9)))])
    target, _ = restored(tmp_path / "target")
    apply(target, log, log.records)
    image = fill_anew(target, log, 3)
    meta = source.delta_meta()
    late = [log.record(fill(1, block(1), block(2))), log.record(hydrated())]
    apply(source, log, late)
    assert source.merge()
    assert entries(source) == 2
    stated = position(log.sequence)
    image = LogImage(position(3), EPOCH, 1, image.filling, (), image.generation, stated)
    target.write_copy(meta if source_known else source.delta_meta(), [source.copy_extent(0)], stated, image)
    target.commit(late)
    target.checkpoint(log.image(), 0)
    assert not target.has_source
    assert target.read(1, 2) == source.read(1, 2) == ZERO + block(2)


def test_a_fill_that_comes_again_changes_nothing(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    apply(store, log, [log.record(fill(1, block(1)))])
    apply(store, log, [log.record(fill(0, block(0), block(1), block(2)))])
    assert store.read(0, 4) == block(0) + block(1) + block(2) + ZERO
    assert [(extent, bits) for extent, bits in store.sealed.changes(0, (1 << 32) - 1, 0, 9)] == [(0, 0b111)]
    store.close()
    assert check_replica(tmp_path / FILE_NAME).problems == []


def test_fills_are_part_of_every_delta(tmp_path: Path) -> None:
    store, log = restored(tmp_path)
    apply(store, log, [log.record(fill(1, block(1)))])
    apply(store, log, [log.record(fill(600, block(2)))])
    assert store.delta_extents(Sequence(0)) == [0, 2]
    assert store.delta_extents(Sequence(1)) == [2]


def test_a_wide_trim_over_a_source_goes_in_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves an entry for each block, so it must not be held in memory as a whole."""
    monkeypatch.setattr(apply_module, "_PUTS_AT_ONCE", 100)
    put: list[int] = []
    put_sorted = apply_module.put_sorted

    def counted(cursor: Any, items: Any) -> None:
        put.append(len(items))
        put_sorted(cursor, items)

    monkeypatch.setattr(apply_module, "put_sorted", counted)
    store, log = restored(tmp_path)
    apply(store, log, [log.record(write(700, block(1)), fill(2, block(2)))])
    apply(store, log, [log.record(trim(10, 3000)), log.record(discard(1500, 10)), log.record(write(900, block(3)))])
    assert max(put) <= 100 + EXTENT_BLOCKS
    assert entries(store) == 3000 - 10 + 1
    content, absent = store.read_with_absent(0, 256)
    assert (content[2 * BLOCK_SIZE : 3 * BLOCK_SIZE], absent) == (block(2), [(0, 2), (3, 7)])
    assert store.read(899, 3) == ZERO + block(3) + ZERO
    store.close()
    assert check_replica(tmp_path / FILE_NAME).problems == []
