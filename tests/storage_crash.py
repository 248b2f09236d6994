"""A child process for tests: writes to a replica's store without end, until it is killed."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from blockstore.record import Record
from blockstore.storage.replica_store import ReplicaStore
from tests.storage_model import Log, block, seal, trim, unpin, write

BLOCKS = 2000


def story(log: Log) -> Iterator[Record]:
    """The same records in every process, one after the other, without end."""
    chance = random.Random(1)
    while True:
        number = chance.randrange(BLOCKS - 8)
        kind = chance.random()
        if kind < 0.8:
            yield log.record(write(number, *[block(chance.randrange(1000)) for _ in range(chance.randint(1, 8))]))
        elif kind < 0.95:
            yield log.record(trim(number, chance.choice([1, 3, 300])))
        elif kind < 0.98 or log.generation < 3:
            yield log.record(seal(b"snap"))
        else:
            yield log.record(unpin(log.generation - 2, b"snap"))


def main(directory: Path) -> None:
    store, log = ReplicaStore.open(directory), Log()
    for record in story(log):
        if record.sequence > store.applied.sequence:
            store.commit([record])
        if record.sequence % 20 == 0 and record.sequence > store.applied.sequence:
            store.checkpoint(log.image(), record.sequence)
            print(record.sequence, flush=True)
        if record.sequence % 300 == 0:
            store.merge()
            store.compact()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
