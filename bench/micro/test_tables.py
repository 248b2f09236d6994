"""Checkpoints into a replica's tables, and reads out of them: also behind a long chain of generations."""

import itertools
import random
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.records import EPOCH, random_records, record, write
from blockstore.domain import Position, ReplicaAddress, ReplicaId, SegmentNumber, VolumeId
from blockstore.log import LogImage
from blockstore.record import Operation, OperationKind
from blockstore.storage.replica_store import ReplicaStore
from blockstore.units import Generation, Sequence

ADDRESS = ReplicaAddress(VolumeId("vol-0123456789abcdef0"), SegmentNumber(0), ReplicaId("rep-0123456789abcdef0"))
BLOCKS = 4096
#: In one checkpoint, each of which waits for the disk.
GENERATIONS_AT_ONCE = 50


def make_store(directory: Path) -> ReplicaStore:
    return ReplicaStore.create(directory / "replica", ADDRESS, LogImage())


def checkpoint(store: ReplicaStore, sequence: int, generation: int = 1) -> None:
    applied = Position(EPOCH, Sequence(sequence))
    store.checkpoint(LogImage(applied=applied, epoch=EPOCH, generation=Generation(generation)), mark=sequence)


@pytest.mark.benchmark(group="checkpoint 4,096 blocks in random order")
def test_checkpoint(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    rounds = itertools.count()

    def commit() -> tuple[tuple[int], dict[str, object]]:
        number = next(rounds)
        batch = list(random_records(BLOCKS, 32, seed=number, first=1 + number * BLOCKS // 32))
        store.commit(batch)
        return (batch[-1].sequence,), {}

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda sequence: checkpoint(store, sequence), setup=commit, rounds=10
    )
    assert store.unapplied_bytes == 0
    store.close()


@pytest.mark.parametrize("generations", [1, 1000])
@pytest.mark.benchmark(group="read one block")
def test_read(benchmark: BenchmarkFixture, tmp_path: Path, generations: int) -> None:
    store = make_store(tmp_path)
    records = list(random_records(BLOCKS, 64))
    store.commit(records)
    checkpoint(store, records[-1].sequence)
    add_generations(store, records[-1].sequence, generations)
    chance = random.Random(1)
    benchmark(lambda: store.read(chance.randrange(BLOCKS), 1))
    store.close()


def add_generations(store: ReplicaStore, sequence: int, generations: int) -> None:
    """Seal the current generation and write eight blocks, until there are so many."""
    for generation in range(2, generations + 1):
        numbers = random.Random(generation).sample(range(BLOCKS), 8)
        seal = record(sequence + 1, [Operation(OperationKind.SEAL)], Generation(generation - 1))
        writes = record(sequence + 2, [write(number) for number in numbers], Generation(generation))
        sequence += 2
        store.commit([seal, writes])
        if generation % GENERATIONS_AT_ONCE == 0 or generation == generations:
            checkpoint(store, sequence, generation)
