"""A group appended to a node's journal, with its fdatasync."""

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.records import record, write
from blockstore.domain import ReplicaId
from blockstore.log import RecordEntry
from blockstore.storage.journal import Journal, JournalEntry
from blockstore.units import GIB

REPLICA = ReplicaId("rep-0123456789abcdef0")
SIZES = {"1 block": 1, "128 KiB": 32, "1 MiB": 256}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="append a group to the journal")
def test_append(benchmark: BenchmarkFixture, tmp_path: Path, size: str) -> None:
    journal, _ = Journal.open(tmp_path / "journal", max_bytes=4 * GIB, marks={REPLICA: 0})
    appended = 0

    def append() -> None:
        nonlocal appended
        appended += 1
        made = record(appended, [write(0, SIZES[size])])
        last = journal.append([JournalEntry(REPLICA, RecordEntry(made), made.position)])
        journal.release(REPLICA, last)

    benchmark(append)
    assert journal.last >= appended
    journal.close()
