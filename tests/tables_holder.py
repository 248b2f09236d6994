"""A child process for tests: opens a replica's tables beside the process that has them, and stays inside a read.

Prints a line once it is inside. For each line that it is sent then, the first 8 bytes of block 0, as that read has it.
"""

import sys
from pathlib import Path

from blockstore.domain import TablesPlace
from blockstore.storage.reads import TableReader
from blockstore.storage.shared_tables import SharedTables
from tests.storage_model import EPOCH


def main(directory: Path, device: int, inode: int) -> None:
    tables = SharedTables(TablesPlace("", str(directory), (device, inode)), EPOCH)
    transaction = tables._begin()
    print("inside", flush=True)
    for _ in sys.stdin:
        reader = TableReader(tables, transaction)
        [found] = reader.read(0, 1)
        print("damaged" if reader.damaged else bytes(found[:8]).hex(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
