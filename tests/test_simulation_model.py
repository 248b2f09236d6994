"""The simulation's model of a replica's tables and the real ones, side by side over the same history.

What the simulation proves of the replication core rests on this model doing what ReplicaStore does:
the same records, checkpoints and copies go to both, and both must show the same, now and in every
sealed generation. The model's extents have four blocks, the real ones 256; a block keeps its extent.
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
    """Random records, one after the other."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._generation = FIRST_GENERATION
        self._end = ORIGIN

    def next(self) -> Twin:
        random, value = self._random, self._end.sequence + 1
        start = random.randrange(BLOCKS)
        count = random.randrange(1, BLOCKS - start + 1)
        kind = random.choice((OperationKind.WRITE,) * 3 + (OperationKind.TRIM,) * 3 + (OperationKind.ZERO,))
        if random.random() < 0.1:
            operations = (Operation(OperationKind.SEAL, argument=b"seal"),) * 2
        elif kind is OperationKind.WRITE:
            data = block_of(value)
            operations = Operation(kind, BlockNumber(start), 1, data), Operation(kind, real_block(start), 1, data)
        else:
            length = real_block(start + count - 1) + 1 - real_block(start)
            operations = Operation(kind, BlockNumber(start), count), Operation(kind, real_block(start), length)
        position = Position(EPOCH, Sequence(value))
        records = [encode_record(position, self._end, self._generation, 1, (operation,)) for operation in operations]
        if operations[0].kind is OperationKind.SEAL:
            self._generation = Generation(self._generation + 1)
        self._end = position
        return Twin(*records)


class Replica:
    """A model and a store that are told the same."""

    def __init__(self, directory: Path, number: int) -> None:
        address = ReplicaAddress(VolumeId("vol-" + "0" * 17), SegmentNumber(0), ReplicaId(f"rep-{number:017x}"))
        self.image = LogImage(epoch=EPOCH, configuration=1)
        self.model = Store(Tables(self.image))
        self.real = ReplicaStore.create(directory, address, self.image)
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
        self.model.tables.write_copy(dict(source.model.tables.sealed), (), stated, self.image)
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

    def shown(self) -> Iterator[tuple[int | None, list[int]]]:
        """What the store shows, now and in each sealed generation, as numbers."""
        yield None, [self._number(self.real.read(real_block(block), 1)) for block in range(BLOCKS)]
        for generation in sorted(self.model.tables.sealed):
            blocks = (self.real.read_generation(Generation(generation), real_block(b), 1) for b in range(BLOCKS))
            yield generation, [self._number(block) for block in blocks]

    def modelled(self) -> Iterator[tuple[int | None, list[int]]]:
        yield None, self.model.read(0, BLOCKS)
        for generation in sorted(self.model.tables.sealed):
            yield generation, [self.model.tables.show(block, generation) for block in range(BLOCKS)]

    @staticmethod
    def _number(block: bytes) -> int:
        assert len(block) == BLOCK_SIZE
        return int.from_bytes(block[:8], "little")


@pytest.mark.parametrize("seed", range(40))
def test_the_model_shows_what_the_store_shows(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    history = History(random)
    source, target = Replica(tmp_path / "source", 1), Replica(tmp_path / "target", 2)
    for _ in range(random.randrange(20)):
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

    since = target.image.filling.since if target.image.filling else Sequence(0)
    extents = source.real.delta_extents(since)
    # What is zeroed twice within one checkpoint raises the store's row once more than needed.
    assert set(source.model.tables.delta_extents(since)) <= set(extents)
    target.copy_meta(source)
    for extent in random.sample(extents, len(extents)):
        go_on()
        target.copy_extent(source, extent)
    go_on()
