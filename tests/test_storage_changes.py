"""Lists of changes never leave one out: while generations merge, tables are compacted, and checkpoints come."""

import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from blockstore.errors import Corrupt, NotFound, QuorumUnavailable
from blockstore.log import Filling
from blockstore.storage import merge as merge_module
from blockstore.storage.keys import blocks_of, extent_key, version_key
from blockstore.storage.merge import merge
from blockstore.storage.reads import CorruptBlocks
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.tables import FILE_NAME
from blockstore.units import EXTENT_BLOCKS, MAX_GENERATION, Generation
from tests.storage_model import (
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
)

EXTENTS = 24


def listed(
    store: ReplicaStore, lowest: int, highest: int, *, page: int = 1000, between: Callable[[], None] = lambda: None
) -> set[int]:
    """All pages; `between` is called after each."""
    found: set[int] = set()
    first = 0
    while True:
        changes = store.sealed.changes(lowest, highest, first, page)
        assert [extent for extent, _ in changes] == sorted({extent for extent, _ in changes if extent >= first})
        found |= {number for extent, bits in changes for number in blocks_of(extent, bits)}
        if len(changes) < page:
            return found
        first = changes[-1][0] + 1
        between()


def merge_all(store: ReplicaStore) -> None:
    store.merge()


def differing(log: Log, older: int, newer: int) -> set[int]:
    before, after = log.blocks[older], log.blocks[newer]
    return {number for number in {*before, *after} if before.get(number) != after.get(number)}


def chain_of_generations(store: ReplicaStore, log: Log, count: int) -> None:
    """Each generation writes or trims in some extents of its own choice."""
    chooser = random.Random(count)
    for generation in range(1, count + 1):
        for extent in chooser.sample(range(EXTENTS), 8):
            number = extent * EXTENT_BLOCKS + chooser.randrange(4)
            change = trim(number, 2) if chooser.random() < 0.3 else write(number, block(chooser.randrange(1000)))
            log.record(change)
        log.record(seal(b"snap-%d" % generation))
    apply(store, log, log.records)


def test_each_pair_of_generations_lists_what_differs_and_each_what_it_changed(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    chain_of_generations(store, log, 6)
    for older, newer in combinations(range(1, 7), 2):
        found = listed(store, older + 1, newer)
        assert found >= differing(log, older, newer)
        touched = [
            number
            for record in log.records
            for operation in record.operations
            if operation.on_blocks and older < record.generation <= newer
            for number in range(operation.start, operation.end)
        ]
        assert found <= set(touched)


def test_a_list_is_whole_while_generations_merge_between_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One extent a page, one extent a merge's transaction, and a checkpoint or a compaction now and then."""
    monkeypatch.setattr(merge_module, "EXTENTS_A_CALL", 1)
    for ahead in range(0, 40, 5):
        store, log = new_store(tmp_path / str(ahead)), Log()
        chain_of_generations(store, log, 6)
        apply(store, log, [log.record(unpin(generation, b"snap-%d" % generation)) for generation in (2, 3, 4, 5)])
        turn = 0

        def merge_steps(count: int, store: ReplicaStore = store) -> None:
            left = iter([False] * count + [True])
            merge(store._tables, lambda: next(left))

        def between(store: ReplicaStore = store, log: Log = log) -> None:
            nonlocal turn
            turn += 1
            merge_steps(3)
            apply(store, log, [log.record(write(turn * EXTENT_BLOCKS, block(turn)))])
            if turn % 7 == 0:
                store.compact()

        merge_steps(ahead)
        wanted = differing(log, 1, 6)
        assert listed(store, 2, 6, page=1, between=between) >= wanted
        assert listed(store, 2, 6) >= wanted
        store.merge()
        assert listed(store, 2, 6) >= wanted
        assert [sealed.generation for sealed in store.sealed.describe().sealed] == [1, 6]
        store.close()


def test_a_list_finds_rows_that_move_to_a_generation_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written in the newest generation of the range: all that it has it takes over meanwhile."""
    monkeypatch.setattr(merge_module, "EXTENTS_A_CALL", 1)
    store, log = new_store(tmp_path), Log()
    apply(store, log, [log.record(seal(b"snap-1"))])
    numbers = {extent * EXTENT_BLOCKS for extent in range(9)}
    apply(store, log, [log.record(write(number, block(number))) for number in sorted(numbers)])
    apply(store, log, [log.record(operation) for operation in (seal(b"snap-2"), seal(b"snap-3"))])
    apply(store, log, [log.record(unpin(2, b"snap-2"))])
    assert listed(store, 2, 3, page=2, between=lambda: merge_all(store)) == numbers


def test_a_generation_that_is_let_go_ends_its_list(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    chain_of_generations(store, log, 2)

    def let_go() -> None:
        apply(store, log, [log.record(unpin(2, b"snap-2"))])
        store.merge()

    with pytest.raises(NotFound):
        listed(store, 1, 2, page=1, between=let_go)
    with pytest.raises(NotFound):
        store.sealed.changes(1, 3, 0, 10)


def test_fills_are_listed_only_where_generation_0_is(tmp_path: Path) -> None:
    store, log = new_store(tmp_path, source=b"snap-0"), Log(source={1: block(1), 2: block(2)})
    for operation in (fill(1, block(1)), write(2, block(9)), discard(5, 3), fill(2, block(2)), hydrated(), seal(b"s")):
        log.record(operation)
    apply(store, log, log.records)
    assert listed(store, 1, 1) == {2}
    assert listed(store, 0, 1) == {1, 2}
    assert listed(store, 0, MAX_GENERATION) == {1, 2}
    assert store.sealed.read(Generation(1), 0, 4) == log.content(0, 4, 1)


def test_a_row_whose_key_was_damaged_is_not_passed_over(tmp_path: Path) -> None:
    """A flipped bit in the generation: the row stands where it stood, and belongs to nothing."""
    store, log = new_store(tmp_path), Log()
    first = 0x123456
    for extent in range(first, first + 3):
        log.record(write(extent * EXTENT_BLOCKS, block(extent)))
    log.record(seal(b"snap"))
    apply(store, log, log.records)
    store.close()
    path = tmp_path / FILE_NAME
    key, content = extent_key(1, first + 1), path.read_bytes()
    assert content.count(key) == 1
    path.write_bytes(content.replace(key, extent_key(3, first + 1)))
    store = ReplicaStore.open(tmp_path)
    with pytest.raises(Corrupt):
        store.sealed.changes(1, 1, 0, 100)
    store.close()


def test_a_replica_that_fills_lists_nothing(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    chain_of_generations(store, log, 2)
    image = log.image()
    filling = Filling(image.applied, position(log.sequence), image.applied.sequence)
    store.checkpoint(type(image)(image.applied, image.epoch, 1, filling, (), image.generation), 0)
    with pytest.raises(QuorumUnavailable):
        store.sealed.changes(1, 2, 0, 100)
    with pytest.raises(QuorumUnavailable):
        store.sealed.read(Generation(1), 0, 1)
    with pytest.raises(QuorumUnavailable):
        store.sealed.describe()


def test_a_lost_entry_is_never_read_as_the_older_version(tmp_path: Path) -> None:
    """A reader of generations keeps what it gets; a read of the present is mended when scrub comes by."""
    store, log = new_store(tmp_path), Log()
    for generation in (1, 2):
        log.record(write(5, block(generation), block(generation), block(generation)))
        log.record(seal(b"snap-%d" % generation))
    apply(store, log, log.records)
    newest, other = store.sealed.read(Generation(2), 5, 1), store.sealed.read(Generation(2), 6, 2)
    assert newest == block(2)

    def lose(transaction: Any) -> None:
        for table in (store._tables.index, store._tables.data):
            assert transaction.delete(version_key(5, 2), db=table)

    store._tables.change(lose)
    with pytest.raises(CorruptBlocks) as raised:
        store.sealed.read_ranges(Generation(2), [(0, 2), (4, 9)])
    assert [tuple(version) for version in raised.value.versions] == [(5, None, None)]
    assert store.sealed.read(Generation(2), 6, 2) == other
    assert store.sealed.read(Generation(1), 5, 1) == block(1)
