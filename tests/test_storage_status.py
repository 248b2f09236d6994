"""What a replica tells of its blocks without reading them, against a model that knows their content."""

import random
import threading
from pathlib import Path

import pytest

from blockstore.errors import Corrupt, QuorumUnavailable
from blockstore.log import Filling
from blockstore.record import Operation, OperationKind
from blockstore.storage.keys import number_key, version_key
from blockstore.storage.reads import CorruptBlocks
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.status import Kind, Page, Run
from blockstore.units import EXTENT_BLOCKS, FILL_GENERATION, TIB, Generation
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

BLOCKS = 3 * EXTENT_BLOCKS
MAPPED = {number: block(9000 + number) for number in (0, 1, 5, 200, 255, 256, 300, 700)}


def all_pages(store: ReplicaStore, end: int = BLOCKS, limit: int = 100, since: int | None = None) -> list[Run]:
    """Runs of all blocks, a page at a time; each page goes on where the one before ended."""
    runs: list[Run] = []
    at = 0
    while at < end:
        page = store.status.shown(at, end, limit) if since is None else store.status.changed(since, at, end)
        assert [run.start for run in page.runs] == [at, *(run.end for run in page.runs[:-1])]
        assert all(run.start < run.end for run in page.runs)
        runs += page.runs
        at = page.runs[-1].end
    assert at == end
    return runs


def by_block(runs: list[Run]) -> dict[int, Run]:
    return {number: run for run in runs for number in range(run.start, run.end)}


class Model:
    """A log, a store that follows it, and what each block should be."""

    def __init__(self, directory: Path, source: dict[int, bytes]) -> None:
        self.log = Log(source=source)
        self.store = new_store(directory, 1, b"snap" if source else b"")
        self.written: dict[int, Generation] = {}
        """The generation of each block's data."""
        self.touched: dict[int, Generation] = {}
        """The last generation in which a change was asked for."""

    def do(self, operation: Operation) -> None:
        self.store.commit([self.log.record(operation)])
        for number in range(operation.start, operation.end):
            if operation.kind is OperationKind.WRITE:
                self.written[number] = self.log.generation
            elif operation.kind in (OperationKind.TRIM, OperationKind.ZERO, OperationKind.DISCARD):
                self.written.pop(number, None)
            if operation.kind in (OperationKind.WRITE, OperationKind.TRIM, OperationKind.ZERO, OperationKind.DISCARD):
                self.touched[number] = self.log.generation

    def checkpoint(self) -> None:
        self.store.checkpoint(self.log.image(), 0)

    def check(self, limit: int) -> None:
        shown = by_block(all_pages(self.store, limit=limit))
        current = self.log.blocks[self.log.generation]
        assert self.store.status.shown(0, 1).has_source == (bool(self.log.source) and not self.log.hydrated)
        for number, run in shown.items():
            content = current.get(number)
            if content not in (None, ZERO):
                assert (run.kind, run.generation) == (Kind.DATA, self.written[number]), number
            elif number in self.log.source and content is None:
                filled = number in self.log.filled
                assert (run.kind, run.generation) == ((Kind.DATA if filled else Kind.ABSENT), FILL_GENERATION), number
            else:
                assert run.kind != Kind.DATA, number
                assert number not in self.log.source or run.kind == Kind.ZERO, "the source would show"

    def check_changes(self, merged: bool) -> None:
        for since in range(1, self.log.generation):
            changed = {number for number, run in by_block(all_pages(self.store, since=since)).items() if run.kind}
            touched = {number for number, generation in self.touched.items() if generation > since}
            before, now = self.log.blocks[since], self.log.blocks[self.log.generation]
            assert changed >= {number for number in {*before, *now} if before.get(number) != now.get(number)}
            assert merged or changed <= touched


def random_operation(chance: random.Random, model: Model) -> Operation:
    start = chance.randrange(BLOCKS)
    match chance.choice(("write", "write", "trim", "zero", "discard", "seal", "fill")):
        case "write":
            return write(
                start, *(block(chance.randrange(1000)) for _ in range(min(chance.randint(1, 4), BLOCKS - start)))
            )
        case "fill" if model.log.source and not model.log.hydrated:
            number = chance.choice(list(model.log.source))
            return fill(number, model.log.source[number])
        case "seal":
            return seal(b"snap-%d" % model.log.generation)
        case "discard":
            length = chance.randint(1, BLOCKS - start)
            if not any(start <= number < start + length for number in model.log.source):
                return discard(start, length)
    operation = chance.choice((trim, zero))
    return operation(start, chance.randint(1, chance.choice((3, BLOCKS - start))))


@pytest.mark.parametrize("seed", range(12))
def test_runs_say_what_each_block_is(tmp_path: Path, seed: int) -> None:
    """Whatever is in memory or in the tables, in whichever generation, with a source or none, page by page."""
    chance = random.Random(seed)
    model = Model(tmp_path, dict(MAPPED) if seed % 2 else {})
    merged = False
    for _ in range(40):
        model.do(random_operation(chance, model))
        if chance.random() < 0.2:
            model.checkpoint()
        if chance.random() < 0.1 and model.log.generation > 1:
            generation = chance.randrange(1, model.log.generation)
            model.do(unpin(generation, b"snap-%d" % generation))
            model.checkpoint()
            model.store.merge()
            merged = True
        if chance.random() < 0.3:
            model.check(chance.choice((1, 50, 100_000)))
            model.check_changes(merged)
    if model.log.source and not model.log.hydrated:
        for number in model.log.absent(0, BLOCKS):
            model.do(fill(number, model.log.source[number]))
        model.do(hydrated())
    model.check(100_000)
    model.checkpoint()
    model.check(7)
    model.check_changes(merged)
    model.store.close()


def test_pins_come_with_the_page(tmp_path: Path) -> None:
    log = Log()
    store = new_store(tmp_path)
    apply(
        store, log, [log.record(write(0, block(1))), log.record(seal(b"a")), log.record(seal(b"b")), log.record(seal())]
    )
    page = store.status.shown(0, 4)
    assert page == Page([Run(0, 1, Kind.DATA, 1), Run(1, 4, Kind.ABSENT)], [Generation(1), Generation(2)], False)
    store.close()


def test_a_sparse_tebibyte_is_one_page(tmp_path: Path) -> None:
    """Its cost is that of its entries."""
    log = Log()
    store = new_store(tmp_path)
    blocks = TIB // 4096
    far = [write(number, block(number)) for number in range(0, blocks, blocks // 1000)]
    apply(store, log, [log.record(each) for each in far])
    store.commit([log.record(trim(5, blocks - 5))])
    store.commit([log.record(write(blocks - 1, block(1)))])
    assert store.status.shown(0, blocks).runs == [
        Run(0, 1, Kind.DATA, 1),
        Run(1, far[1].start, Kind.ABSENT),
        *[
            run
            for here, there in zip(far[1:], [*far[2:], None], strict=True)
            for run in (
                Run(here.start, here.start + 1, Kind.ZERO, 1),
                Run(here.start + 1, there.start if there else blocks - 1, Kind.ABSENT),
            )
            if run.start < run.end
        ],
        Run(blocks - 1, blocks, Kind.DATA, 1),
    ]
    store.close()


def test_a_lost_entry_is_corrupt_and_no_hole(tmp_path: Path) -> None:
    log = Log()
    store = new_store(tmp_path)
    apply(store, log, [log.record(write(EXTENT_BLOCKS - 2, *(block(i) for i in range(4))))])
    store._tables.change(lambda transaction: transaction.delete(version_key(EXTENT_BLOCKS, 1), db=store._tables.index))
    with pytest.raises(CorruptBlocks, match=str(EXTENT_BLOCKS)):
        store.status.shown(0, BLOCKS)
    store._tables.change(lambda transaction: transaction.put(number_key(1), b"\0" * 40, db=store._tables.present))
    with pytest.raises(Corrupt):
        store.status.shown(EXTENT_BLOCKS, BLOCKS)
    store.close()


def test_an_entry_of_zeroes_that_fails_its_check_is_no_hole(tmp_path: Path) -> None:
    log = Log()
    store = new_store(tmp_path)
    apply(store, log, [log.record(write(0, block(1))), log.record(seal(b"a")), log.record(trim(0, 1))])
    key = version_key(0, 2)
    store._tables.change(lambda transaction: transaction.put(key, b"\0" * 17, db=store._tables.index))
    with pytest.raises(CorruptBlocks):
        store.status.shown(0, 4)
    store.close()


def test_a_filling_replica_tells_nothing(tmp_path: Path) -> None:
    log = Log()
    store = new_store(tmp_path)
    apply(store, log, [log.record(write(0, block(1)))])
    image = log.image()
    filling = Filling(floor=position(9), base=position(1), since=position(0).sequence)
    store.checkpoint(image.__class__(image.applied, EPOCH, 1, filling, (), image.generation, image.applied), 0)
    with pytest.raises(QuorumUnavailable):
        store.status.shown(0, 1)
    with pytest.raises(QuorumUnavailable):
        store.status.changed(1, 0, 1)
    store.close()


def test_no_block_that_is_always_there_is_told_as_a_hole_while_checkpoints_go_on(tmp_path: Path) -> None:
    """What a checkpoint carries from memory into the tables is in neither for who looks at the tables first."""
    log = Log()
    store = new_store(tmp_path)
    stop = threading.Event()
    wrong: list[Run] = []

    def look() -> None:
        while not stop.is_set():
            page = store.status.shown(0, BLOCKS)
            wrong.extend(run for run in page.runs if run.start < 64 and run.kind != Kind.DATA)

    for start in range(0, 64, 4):
        store.commit([log.record(write(start, *(block(start + i) for i in range(4))))])
    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(60):
            start = turn % 16 * 4
            store.commit([log.record(write(start, *(block(turn * 10 + i) for i in range(4))))])
            store.checkpoint(log.image(), 0)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong
    store.close()
