"""A replica's store: what is committed is read, before, during and after checkpoints and restarts."""

import random
import threading
from pathlib import Path

import pytest

from blockstore.errors import Corrupt, NotFound, OutOfRange
from blockstore.log import Filling, LogImage
from blockstore.record import OperationKind
from blockstore.storage.replica_store import ReplicaStore
from blockstore.units import BLOCK_SIZE, MAX_BLOCKS, Generation, Sequence
from tests.storage_model import Log, address, apply, block, fill, new_store, position, seal, trim, write, zero


def test_a_new_replica_reads_as_zeroes_and_knows_who_it_is(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    assert store.read(0, 3) == bytes(3 * BLOCK_SIZE)
    assert store.read(MAX_BLOCKS - 1, 1) == bytes(BLOCK_SIZE)
    assert (store.address, store.image, store.mark) == (address(), LogImage(), 0)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 0), (MAX_BLOCKS, 1), (MAX_BLOCKS - 1, 2)])
def test_a_read_beyond_what_a_segment_can_have_is_refused(tmp_path: Path, start: int, count: int) -> None:
    with pytest.raises(OutOfRange):
        new_store(tmp_path).read(start, count)


def test_committed_records_are_read_before_and_after_their_checkpoint(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    store.commit([log.record(write(10, block(1), block(2)), write(300, block(3))), log.record(trim(11, 1))])
    assert store.unapplied_bytes > 3 * BLOCK_SIZE
    for _ in range(2):
        assert store.read(9, 4) == log.content(9, 4)
        assert store.read(300, 1) == block(3)
        store.checkpoint(log.image(), 7)
        assert store.unapplied_bytes == 0
    store.close()
    again = ReplicaStore.open(tmp_path)
    assert (again.image, again.mark) == (log.image(), 7)
    assert again.read(0, 512) == log.content(0, 512)


def test_what_it_uses_once_its_files_are_deleted(tmp_path: Path) -> None:
    """Metrics are taken while replicas come and go: that one is left out, and the others are told."""
    store = new_store(tmp_path)
    assert store.usage().file_bytes == store.file_bytes() > 0
    store._tables.path.unlink()
    with pytest.raises(NotFound):
        store.usage()
    store.close()


def test_records_behind_the_image_stay_in_memory(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    store.commit([log.record(write(1, block(1))), log.record(write(1, block(2)), trim(7, 1))])
    store.checkpoint(log.image(up_to=1), 0)
    assert store.read(1, 1) == block(2)
    assert store.unapplied_bytes > 0
    store.reset()
    assert store.unapplied_bytes == 0
    assert store.read(1, 1) == block(1)


def test_uncommitted_records_of_an_image_come_back_with_it(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    store.commit([log.record(write(1, block(1)))])
    tail = (log.record(write(2, block(2))), log.record(write(3, block(3))))
    base = log.image(up_to=1)
    filling = Filling(position(9), position(1), Sequence(0))
    known = ((address(2).replica, position(7)), (address(3).replica, position(1)))
    image = LogImage(base.applied, base.epoch, 3, filling, tail, base.generation, position(5), known)
    store.checkpoint(image, 1)
    store.close()
    store = ReplicaStore.open(tmp_path)
    assert store.image == image
    assert store.read(2, 1) == bytes(BLOCK_SIZE)
    shorter = LogImage(base.applied, base.epoch, 3, None, tail[:1], base.generation, position(5))
    store.checkpoint(shorter, 2)
    store.close()
    assert ReplicaStore.open(tmp_path).image == shorter


def test_a_sealed_generation_is_read_as_it_was(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    first = [log.record(write(0, block(1), block(2), block(3))), log.record(seal(b"snap-a"))]
    second = [log.record(write(1, block(4)), trim(2, 1)), log.record(seal(b"snap-b")), log.record(zero(0, 1))]
    with pytest.raises(NotFound):
        store.sealed.read(Generation(1), 0, 1)
    apply(store, log, first + second)
    for generation in (1, 2):
        assert store.sealed.read(Generation(generation), 0, 5) == log.content(0, 5, generation)
    assert store.read(0, 5) == log.content(0, 5) == bytes(BLOCK_SIZE) + block(4) + bytes(3 * BLOCK_SIZE)
    with pytest.raises(NotFound):
        store.sealed.read(Generation(3), 0, 1)


@pytest.mark.parametrize("width", [3, 8, 40])
def test_long_chains_are_read_right_in_runs(tmp_path: Path, width: int) -> None:
    """Few versions a block are walked over, many are passed over by seeks; zeroes and gaps lie between."""
    store, log = new_store(tmp_path), Log()
    for turn in range(60):
        number = turn * 11 % 50
        count = 1 if turn < 30 else width
        operation = trim(number, 2) if turn % 7 == 6 else write(number, *[block(turn + i) for i in range(count)])
        store.commit([log.record(operation), log.record(seal(b"snap"))])
    for number in range(5):  # every generation's worth of versions for these
        store.commit([log.record(write(number, block(number)))])
    store.checkpoint(log.image(), 0)
    for start, length in ((0, 100), (0, 4), (7, 13), (45, 60), (0, 3), (3, 2), (11, 1)):
        assert store.read(start, length) == log.content(start, length)
        for generation in range(1, 61):
            found = store.sealed.read(Generation(generation), start, length)
            assert found == log.content(start, length, generation), generation


def test_as_many_rows_as_blocks_may_be_those_of_others(tmp_path: Path) -> None:
    """One block has two versions, and another one has none: its neighbours do not take its place."""
    store, log = new_store(tmp_path), Log()
    records = [log.record(write(2, block(2))), log.record(seal(b"snap"))]
    records.append(log.record(write(0, *map(block, range(10, 15))), write(6, block(16), block(17))))
    apply(store, log, records)
    assert store.read(0, 8) == log.content(0, 8)
    assert store.read(0, 8)[5 * BLOCK_SIZE : 6 * BLOCK_SIZE] == bytes(BLOCK_SIZE)


@pytest.mark.parametrize("seed", range(40))
def test_any_range_of_any_generation_is_read_as_it_was_written(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    store, log = new_store(tmp_path), Log()
    records = []
    for _ in range(chance.randrange(1, 4)):
        for _ in range(chance.randrange(1, 4)):
            start, count = chance.randrange(10), chance.randrange(1, 10)
            change = [write(start, *(block(chance.randrange(99)) for _ in range(count))), trim(start, count)]
            records.append(log.record(*chance.choices([change[0], change[1], zero(start, count)], weights=[6, 1, 1])))
        records.append(log.record(seal(b"snap")))
    apply(store, log, records)
    sealed = range(1, 1 + sum(record.operations[0].kind is OperationKind.SEAL for record in records))
    for start in range(10):
        for count in range(1, 22 - start):
            assert store.read(start, count) == log.content(start, count)
            for generation in sealed:
                assert store.sealed.read(Generation(generation), start, count) == log.content(start, count, generation)
    store.close()


def test_a_block_with_many_versions_is_found_by_seeks(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    for turn in range(40):
        store.commit([log.record(write(2, *[block(turn + i) for i in range(6)])), log.record(seal(b"snap"))])
    store.checkpoint(log.image(), 0)
    for generation in range(1, 41):
        assert store.sealed.read(Generation(generation), 0, 12) == log.content(0, 12, generation)
    assert store.read(0, 12) == log.content(0, 12)


def test_a_trim_of_a_whole_fresh_volume_costs_nothing(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    apply(store, log, [log.record(trim(0, (1 << 32) - 1))])
    assert store.usage().user_bytes == 0
    apply(store, log, [log.record(write(5, block(1)), write(MAX_BLOCKS - 1, block(2)))])
    store.commit([log.record(trim(0, (1 << 32) - 1))])
    for _ in range(2):
        assert store.read(5, 1) == bytes(BLOCK_SIZE)
        assert store.read(MAX_BLOCKS - 1, 1) == block(2)
        store.checkpoint(log.image(), 0)
    assert store.usage().user_bytes == BLOCK_SIZE


def test_a_fill_never_covers_what_the_guest_wrote_or_trimmed(tmp_path: Path) -> None:
    store, log = new_store(tmp_path, source=b"snap-1"), Log()
    apply(store, log, [log.record(write(1, block(1)), trim(2, 1))])
    store.commit([log.record(fill(0, block(7), block(8), block(9)))])
    for _ in range(2):
        assert store.read(0, 4) == block(7) + block(1) + bytes(2 * BLOCK_SIZE)
        store.checkpoint(log.image(), 0)
    store.commit([log.record(fill(5, block(5), block(6))), log.record(write(5, block(2)), trim(6, 1))])
    for _ in range(2):
        assert store.read(5, 2) == block(2) + bytes(BLOCK_SIZE)
        store.checkpoint(log.image(), 0)


def test_reads_and_commits_go_on_during_checkpoints(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    stop = threading.Event()
    failures: list[BaseException] = []
    images = [log.image()]

    def checkpoint() -> None:
        try:
            while not stop.is_set():
                store.checkpoint(images[-1], 0)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=checkpoint)
    thread.start()
    try:
        for turn in range(400):
            number = turn * 7 % 60
            operation = trim(number, 9) if turn % 5 == 4 else write(number, block(turn), block(turn + 1000))
            store.commit([log.record(operation)])
            images.append(log.image())
            assert store.read(0, 80) == log.content(0, 80)
    finally:
        stop.set()
        thread.join()
    assert failures == []
    store.checkpoint(log.image(), 0)
    assert store.read(0, 80) == log.content(0, 80)


def test_a_directory_without_tables_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        ReplicaStore.open(tmp_path)


def test_a_copy_leaves_records_in_memory_as_they_are(tmp_path: Path) -> None:
    """One comes for each extent: to sort what the replica holds anew each time made a fill of 4 GiB last minutes."""
    source, target, log = new_store(tmp_path / "a", 1), new_store(tmp_path / "b", 2), Log()
    apply(source, log, [log.record(write(5, block(5)))])
    target.commit([log.record(write(6, block(6)))])
    held = target._unapplied._active
    image = LogImage(applied=position(1), filling=Filling(position(1), position(1), Sequence(0)))
    target.write_copy(source.delta_meta(), [source.copy_extent(0)], position(1), image)
    with pytest.raises(Corrupt):
        target.write_copy(None, [[b"rubbish"]], position(1), image)
    assert target._unapplied._active is held
    assert target.read(5, 2) == block(5) + block(6)
