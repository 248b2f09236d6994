"""A group of a node's journal: made, and appended with its fdatasync.

The latter is compared with a plain write and fdatasync of as much at the same place, so that what stands in the
baseline is not this disk.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.calibration import Calibration
from bench.micro.records import record, write
from blockstore.domain import ReplicaId
from blockstore.log import EntryKind, RecordEntry
from blockstore.storage.journal import Journal, JournalEntry
from blockstore.storage.journal_format import Draft, round_up
from blockstore.units import BLOCK_SIZE, GIB, MIB

REPLICA = ReplicaId("rep-0123456789abcdef0")
SIZES = {"1 block": 1, "128 KiB": 32, "1 MiB": 256}


@contextmanager
def _plain_file(path: Path, size: int) -> Iterator[int]:
    """Of bytes that the disk has already, so that a sync of them changes nothing else."""
    with path.open("wb", buffering=0) as file:
        file.write(bytes(size))
        os.fsync(file.fileno())
        yield file.fileno()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="encode a group of the journal")
def test_encode(benchmark: BenchmarkFixture, size: str) -> None:
    made = record(1, [write(0, SIZES[size])])

    def encode() -> list[bytes | memoryview]:
        draft = Draft(2, 2, ())
        draft.add(REPLICA, RecordEntry(made), made.position, (EntryKind.RECORD, made.encoded), 1)
        return draft.encode(7)

    assert sum(map(len, benchmark(encode))) % BLOCK_SIZE == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="append a group to the journal, with fdatasync")
def test_append(benchmark: BenchmarkFixture, tmp_path: Path, calibration: Calibration, size: str) -> None:
    journal, _ = Journal.open(tmp_path / "journal", max_bytes=4 * GIB, marks={REPLICA: 0})
    content = bytes(round_up(SIZES[size] * BLOCK_SIZE + 1))
    appended = 0

    def append() -> None:
        nonlocal appended
        appended += 1
        made = record(appended, [write(0, SIZES[size])])
        last = journal.append([JournalEntry(REPLICA, RecordEntry(made), made.position)])
        journal.release(REPLICA, last)

    with _plain_file(tmp_path / "plain", 16 * MIB) as fd:

        def write_plainly() -> None:
            os.pwrite(fd, content, 0)
            os.fdatasync(fd)

        calibration.by(write_plainly)
        benchmark(append)
    assert journal.last >= appended
    journal.close()
