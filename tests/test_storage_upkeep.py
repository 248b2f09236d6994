"""Merging, compaction and the growing map: content stays, space comes back, reads go on."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockstore.errors import Conflict, Corrupt, NotFound
from blockstore.log import Filling, LogImage
from blockstore.node.daemon import SWITCH_INTERVAL_S
from blockstore.storage import compaction, tables
from blockstore.storage.check import check_replica
from blockstore.storage.reads import TableReader
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.tables import FILE_NAME, Tables, replacement_of
from blockstore.units import BLOCK_SIZE, MAX_GENERATION, MIB, Generation, Sequence
from tests.storage_model import Log, apply, block, new_store, pin, position, seal, trim, unpin, write


@pytest.fixture(autouse=True)
def switch_interval() -> Iterator[None]:
    """As every node sets it: with Python's own, threads in LMDB can keep a third one waiting for minutes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    yield
    sys.setswitchinterval(before)


def chain(store: ReplicaStore, log: Log, length: int) -> None:
    """`length` snapshots, each after one block of its own and one that all of them write."""
    for i in range(length):
        apply(store, log, [log.record(write(0, block(i)), write(i + 1, block(i))), log.record(seal(b"snap"))])


def blocks_stored(store: ReplicaStore) -> int:
    return store.usage().user_bytes // BLOCK_SIZE


def check(store: ReplicaStore) -> None:
    store.close()
    found = check_replica(store.directory / FILE_NAME).problems
    assert found == [], found[0].what


def test_merging_deletes_what_no_pinned_generation_can_see(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    chain(store, log, 6)
    assert blocks_stored(store) == 12
    assert not store.merge()
    apply(store, log, [log.record(*[unpin(generation, b"snap") for generation in (1, 2, 4, 5)])])
    assert store.merge()
    assert blocks_stored(store) == 8  # the shared block in generations 3 and 6 only
    for generation in (3, 6):
        assert store.sealed.read(Generation(generation), 0, 9) == log.content(0, 9, generation)
    for generation in (1, 2, 4, 5):
        with pytest.raises(NotFound):
            store.sealed.read(Generation(generation), 0, 1)
    assert store.read(0, 9) == log.content(0, 9)
    assert not store.merge()
    assert store.delta_extents(Sequence(12)) == []
    assert store.delta_extents(Sequence(10)) == [0]
    apply(store, log, [log.record(unpin(3, b"snap"), unpin(6, b"snap"))])
    assert store.merge()
    assert blocks_stored(store) == 7
    assert store.read(0, 9) == log.content(0, 9)
    check(store)


def test_one_of_two_pins_keeps_a_generation(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    chain(store, log, 2)
    apply(store, log, [log.record(pin(1, b"restore")), log.record(unpin(1, b"snap"))])
    assert not store.merge()
    assert store.sealed.read(Generation(1), 0, 3) == log.content(0, 3, 1)
    apply(store, log, [log.record(unpin(1, b"restore"))])
    assert store.merge()
    check(store)


def test_zeroes_with_nothing_below_them_go(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    apply(store, log, [log.record(write(0, block(1), block(2))), log.record(seal(b"a")), log.record(trim(0, 1))])
    assert store.read(0, 2) == log.content(0, 2)
    apply(store, log, [log.record(unpin(1, b"a"))])
    assert store.merge()
    assert blocks_stored(store) == 1
    with store._tables.reading() as transaction:
        assert [found.number for found in TableReader(store._tables, transaction).versions(0, 9)] == [1]
    check(store)


def test_zeroes_stay_while_there_is_a_source(tmp_path: Path) -> None:
    store, log = new_store(tmp_path, source=b"snap-0"), Log()
    apply(store, log, [log.record(write(0, block(1))), log.record(seal(b"a")), log.record(trim(0, 2))])
    apply(store, log, [log.record(unpin(1, b"a"))])
    assert store.merge()
    with store._tables.reading() as transaction:
        found = TableReader(store._tables, transaction).versions(0, 9, MAX_GENERATION)
        assert [(version.number, version.block) for version in found] == [(0, None), (1, None)]
    check(store)


def test_a_filling_replica_neither_merges_nor_compacts(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    apply(store, log, [log.record(write(0, block(1))), log.record(seal())])
    filling = Filling(position(2), position(2), Sequence(0))
    store.checkpoint(LogImage(position(2), filling=filling, generation=Generation(2)), 0)
    assert not store.merge()
    assert not store.compact()
    with pytest.raises(Corrupt):
        store.write_copy(store.delta_meta(), [], position(1), store.image)
    with pytest.raises(Conflict):
        store.write_copy(store.delta_meta(), [], position(2), log.image())


def test_compaction_gives_space_back_and_keeps_all(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    for start in range(0, 2048, 256):
        apply(store, log, [log.record(write(start, *[block(start + i) for i in range(256)]))])
    apply(store, log, [log.record(seal(b"a")), log.record(write(3, block(1)))])
    apply(store, log, [log.record(trim(100, 1900)), log.record(unpin(1, b"a"))])
    store.merge()
    before, content = store.usage(), store.read(0, 2048)
    assert before.free_page_bytes > 1800 * BLOCK_SIZE
    assert store.compact()
    after = store.usage()
    assert after.user_bytes == before.user_bytes
    assert after.file_bytes < before.file_bytes - 1800 * BLOCK_SIZE
    assert after.free_page_bytes < 64 * BLOCK_SIZE
    assert store.read(0, 2048) == content == log.content(0, 2048)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, FILE_NAME + "-lock"]
    apply(store, log, [log.record(write(7, block(7)))])
    assert store.read(0, 2048) == log.content(0, 2048)
    check(store)


def test_what_an_interrupted_compaction_left_goes_at_the_next_start(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    apply(store, log, [log.record(write(0, block(1)))])
    store.close()
    replacement_of(tmp_path / FILE_NAME).write_bytes(b"half a copy")
    assert ReplicaStore.open(tmp_path).read(0, 1) == block(1)
    assert not replacement_of(tmp_path / FILE_NAME).exists()


def _forever(call: Callable[[], object], stop: threading.Event, failures: list[BaseException]) -> threading.Thread:
    def run() -> None:
        try:
            while not stop.is_set():
                call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_compactions_merges_checkpoints_and_reads_at_once(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    stop, failures = threading.Event(), list[BaseException]()
    images = [log.image()]
    threads = [
        _forever(store.compact, stop, failures),
        _forever(store.merge, stop, failures),
        _forever(lambda: store.checkpoint(images[-1], 0), stop, failures),
        _forever(lambda: store.read(0, 600), stop, failures),
    ]
    try:
        for turn in range(250):
            number = turn * 37 % 550
            plain = trim(number, 90) if turn % 4 == 3 else write(number, block(turn), block(turn + 1))
            records = [log.record(plain)]
            if turn % 10 == 9:
                records.append(log.record(seal(b"s")))
            if turn % 20 == 19:
                records.append(log.record(unpin(log.generation - 1, b"s")))
            store.commit(records)
            images.append(log.image())
            same = store.read(0, 600) == log.content(0, 600)
            assert same  # megabytes, of which nobody wants to see the difference
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    store.checkpoint(log.image(), 0)
    store.merge()
    assert store.read(0, 600) == log.content(0, 600)
    for generation in log.pins:
        if log.pins[generation]:
            assert store.sealed.read(Generation(generation), 0, 600) == log.content(0, 600, generation)
    check(store)


def test_a_compaction_carries_what_a_checkpoint_adds_behind_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, log = new_store(tmp_path), Log()
    apply(store, log, [log.record(write(0, block(1)))])
    list_changed, late = compaction._changed, [log.record(write(300, block(2)))]

    def list_then_checkpoint(*tables: Tables) -> list[int]:
        changed = list_changed(*tables)
        if late:
            apply(store, log, [late.pop()])
        return changed

    monkeypatch.setattr(compaction, "_changed", list_then_checkpoint)
    assert store.compact()
    assert store.read(0, 400) == log.content(0, 400)
    check(store)


def test_the_map_grows_under_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "INITIAL_MAP_BYTES", MIB)
    store, log = new_store(tmp_path), Log()
    stop, failures = threading.Event(), list[BaseException]()
    threads = [_forever(lambda: store.read(0, 16), stop, failures) for _ in range(2)]
    try:
        for start in range(0, 2048, 256):
            apply(store, log, [log.record(write(start, *[block(start)] * 256))])
            assert store.read(start, 1) == block(start)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert os.stat(tmp_path / FILE_NAME).st_size > 8 * MIB
    assert store.read(0, 2048) == log.content(0, 2048)
    check(store)


def test_tables_that_were_closed_are_not_compacted_any_more(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    store.close()
    assert not store.compact()
    assert not store.merge()
