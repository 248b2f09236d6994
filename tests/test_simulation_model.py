"""The simulation's model of a replica's tables and the real ones, side by side over the same history.

What the simulation proves of the replication core rests on this model doing what ReplicaStore does:
the same records, checkpoints, merges and copies go to both, and both must show the same, now and in every
pinned generation, and have the same pins and source. The model's extents have four blocks, the real ones
256; a block keeps its extent.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest

from blockstore.domain import ORIGIN, Position, ReplicaAddress, ReplicaId, SegmentNumber, VolumeId
from blockstore.log import Filling, LogImage
from blockstore.record import Operation, OperationKind, Record, encode_record
from blockstore.storage.replica_store import ReplicaStore
from blockstore.units import (
    BLOCK_SIZE,
    EXTENT_BLOCKS,
    FIRST_GENERATION,
    BlockNumber,
    Epoch,
    Generation,
    Sequence,
)
from tests.simulation import model_tables
from tests.simulation.model_tables import Store, Tables, block_of

BLOCKS = 12
SOURCE_VALUES = 1 << 40
Operations = tuple[Operation, Operation]
"""For the model and for the store."""
CHANGES = (OperationKind.WRITE,) * 3 + (OperationKind.TRIM,) * 3 + (OperationKind.ZERO, OperationKind.DISCARD)
EPOCH = Epoch(1)


def real_block(block: int) -> BlockNumber:
    extent, within = divmod(block, model_tables.EXTENT_BLOCKS)
    return BlockNumber(extent * EXTENT_BLOCKS + within)


@dataclass(frozen=True)
class Twin:
    """One record, for the model and for the store."""

    model: Record
    real: Record


class History:
    """Random records, one after the other. mapped: the blocks that a source has; none for a plain volume."""

    def __init__(self, random: Random, mapped: frozenset[int]) -> None:
        self._random = random
        self._mapped = mapped
        self._held: list[tuple[Generation, bytes]] = []
        self._hydrated = False
        self._generation = FIRST_GENERATION
        self._end = ORIGIN

    def next(self) -> Twin:
        value = self._end.sequence + 1
        operations = self._control(value) or self._fill() or self._change(value)
        position = Position(EPOCH, Sequence(value))
        records = [encode_record(position, self._end, self._generation, 1, (operation,)) for operation in operations]
        if operations[0].kind is OperationKind.SEAL:
            self._held.append((self._generation, operations[0].argument))
            self._generation = Generation(self._generation + 1)
        self._hydrated |= operations[0].kind is OperationKind.HYDRATED
        self._end = position
        return Twin(*records)

    def _change(self, value: int) -> Operations:
        random = self._random
        start = random.randrange(BLOCKS)
        count = random.randrange(1, BLOCKS - start + 1)
        kind = random.choice(CHANGES)
        if kind is OperationKind.WRITE:
            data = block_of(value)
            return Operation(kind, BlockNumber(start), 1, data), Operation(kind, real_block(start), 1, data)
        if kind is OperationKind.DISCARD and self._mapped & set(range(start, start + count)):
            kind = OperationKind.TRIM
        length = real_block(start + count - 1) + 1 - real_block(start)
        return Operation(kind, BlockNumber(start), count), Operation(kind, real_block(start), length)

    def _fill(self) -> Operations | None:
        if not self._mapped or self._hydrated or self._random.random() > 0.3:
            return None
        block = self._random.choice(sorted(self._mapped))
        data = block_of(SOURCE_VALUES + block)
        kind = OperationKind.FILL
        return Operation(kind, BlockNumber(block), 1, data), Operation(kind, real_block(block), 1, data)

    def _control(self, value: int) -> Operations | None:
        draw = self._random.random()
        if draw < 0.1:
            return (Operation(OperationKind.SEAL, argument=b"%d" % value),) * 2
        if draw < 0.16 and self._held:
            generation, holder = self._held.pop(self._random.randrange(len(self._held)))
            return (Operation(OperationKind.UNPIN, BlockNumber(generation), argument=holder),) * 2
        if draw < 0.19 and self._mapped and not self._hydrated:
            return (Operation(OperationKind.HYDRATED),) * 2
        return None


class Replica:
    """A model and a store that are told the same."""

    def __init__(self, directory: Path, number: int, *, source: bool) -> None:
        address = ReplicaAddress(VolumeId("vol-" + "0" * 17), SegmentNumber(0), ReplicaId(f"rep-{number:017x}"))
        self.image = LogImage(epoch=EPOCH, configuration=1)
        self.model = Store(Tables(self.image, source=source))
        self.real = ReplicaStore.create(directory, address, self.image, source=b"snap" if source else b"")
        self._committed = ORIGIN
        self._generation = FIRST_GENERATION

    def commit(self, twin: Twin) -> None:
        self.model.commit([twin.model])
        self.real.commit([twin.real])
        self._committed = twin.real.position
        self._generation = twin.real.generation
        if twin.real.operations[0].kind is OperationKind.SEAL:
            self._generation = Generation(self._generation + 1)

    def checkpoint(self) -> None:
        self.image = replace(self.image, applied=self._committed, generation=self._generation)
        self.model.checkpoint(self.image, 0)
        self.real.checkpoint(self.image, 0)

    def fill(self, base: Position) -> None:
        """What a ResetLog and its filling entry leave."""
        since = self.image.applied.sequence
        self.model.reset()
        self.real.reset()
        self._committed = base
        self.image = replace(self.image, filling=Filling(base, base, since))

    def copy_meta(self, source: "Replica") -> None:
        stated = self._state(source)
        self.model.tables.write_copy(source.model.tables.copy_meta(), (), stated, self.image)
        self.real.write_copy(source.real.delta_meta(), (), stated, self.image)

    def copy_extent(self, source: "Replica", extent: int) -> None:
        stated = self._state(source)
        self.model.tables.write_copy(None, (source.model.tables.copy_extent(extent),), stated, self.image)
        self.real.write_copy(None, (source.real.copy_extent(extent),), stated, self.image)

    def _state(self, source: "Replica") -> Position:
        stated = source.image.applied
        self.image = replace(self.image, copied=max(self.image.copied, stated))
        return stated

    def become_whole(self) -> None:
        self.image = replace(self.image, filling=None)
        self.checkpoint()

    def merge(self) -> None:
        self.model.tables.merge()
        self.real.merge()

    def shown(self) -> Iterator[tuple[int | None, list[int]]]:
        """What the store shows, now and in each pinned generation, as numbers."""
        yield None, [self._number(self.real.read(real_block(block), 1)) for block in range(BLOCKS)]
        for generation in self._pinned():
            blocks = (self.real.sealed.read(Generation(generation), real_block(b), 1) for b in range(BLOCKS))
            yield generation, [self._number(block) for block in blocks]

    def modelled(self) -> Iterator[tuple[int | None, list[int]]]:
        yield None, [value or 0 for value in self.model.read(0, BLOCKS)]
        for generation in self._pinned():
            yield generation, [self.model.tables.show(block, generation) or 0 for block in range(BLOCKS)]

    def check_the_rest(self, mapped: frozenset[int]) -> None:
        """What reads do not show: pins, the source, and what of it is absent."""
        found = self.real.sealed.describe()
        assert {(pin.generation, pin.holder) for pin in found.pins} == set(self.model.tables.pins)
        assert bool(found.source) == self.real.has_source == self.model.has_source
        if self.real.has_source:
            absent = {block for block in mapped if self.real.read_with_absent(real_block(block), 1)[1]}
            assert absent == {block for block in mapped if self.model.read(block, 1) == [None]}

    def _pinned(self) -> list[int]:
        return sorted({generation for generation, _ in self.model.tables.pins})

    @staticmethod
    def _number(block: bytes) -> int:
        assert len(block) == BLOCK_SIZE
        return int.from_bytes(block[:8], "little")


@pytest.mark.parametrize("seed", range(60))
def test_the_model_shows_what_the_store_shows(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    mapped = frozenset(block for block in range(BLOCKS) if seed % 2 and random.random() < 0.5)
    history = History(random, mapped)
    source = Replica(tmp_path / "source", 1, source=bool(mapped))
    target = Replica(tmp_path / "target", 2, source=bool(mapped) and seed % 4 == 1)
    began = random.randrange(20) if target.real.has_source == source.real.has_source else 0
    for _ in range(began):
        twin = history.next()
        source.commit(twin)
        target.commit(twin)
    target.checkpoint()
    for _ in range(random.randrange(1, 30)):
        source.commit(history.next())
    source.checkpoint()
    target.fill(source.image.applied)
    _copy_while_writing(random, history, source, target)
    target.become_whole()
    source.checkpoint()
    assert list(source.shown()) == list(source.modelled())
    assert list(target.shown()) == list(target.modelled())
    assert list(target.shown()) == list(source.shown())
    for replica in (source, target):
        replica.check_the_rest(mapped)
        replica.real.close()


def _copy_while_writing(random: Random, history: History, source: Replica, target: Replica) -> None:
    """Extent by extent, while both go on: each at its own pace."""

    def go_on() -> None:
        for _ in range(random.randrange(4)):
            twin = history.next()
            source.commit(twin)
            target.commit(twin)
        for replica in (source, target):
            if random.random() < 0.5:
                replica.checkpoint()
            if random.random() < 0.3:
                replica.merge()

    since = target.image.filling.since if target.image.filling else Sequence(0)
    extents = source.real.delta_extents(since)
    # What is zeroed twice within one checkpoint raises the store's row once more than needed.
    assert set(source.model.tables.delta_extents(since)) <= set(extents)
    target.copy_meta(source)
    for extent in random.sample(extents, len(extents)):
        go_on()
        target.copy_extent(source, extent)
    go_on()
