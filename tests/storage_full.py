"""A child process for tests: mounts a small file system of its own and fills it up with a replica's store."""

import os
import subprocess
import sys
from pathlib import Path

from blockstore.errors import NoSpace
from blockstore.log import LogImage
from blockstore.storage.check import check_node
from blockstore.storage.node_store import NodeStore
from blockstore.storage.space import disk_free_bytes
from blockstore.units import BLOCK_SIZE, MIB
from tests.storage_model import Log, address, apply, block, trim, write

SIZE = 24 * MIB
RESERVE = 4 * MIB
BATCH = 128


def main(directory: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(directory)], check=True)
    junk = directory / "junk"
    with junk.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 6 * MIB)
    node = NodeStore.open(directory / "data", reserve_bytes=RESERVE)
    store, log = node.create_replica(address(), LogImage()), Log()
    ballast = directory / "data" / "ballast"
    assert ballast.exists()
    assert not node.space.poll()
    start, given_up_at = 0, 0
    try:
        while True:
            apply(store, log, [log.record(write(start, *[block(start + i) for i in range(BATCH)]))])
            start += BATCH
            if not ballast.exists() and not given_up_at:
                given_up_at = start
    except NoSpace:
        pass
    # The ballast let at least one more checkpoint through, and the one that failed is all in memory still.
    assert 0 < given_up_at < start
    assert node.space.poll()
    assert store.unapplied_bytes > BATCH * BLOCK_SIZE
    assert store.applied.sequence == log.sequence - 1
    for at in range(0, start + BATCH, BATCH):
        assert store.read(at, BATCH) == log.content(at, BATCH)
    assert not store.has_room(0)
    # A delete makes room; what had failed goes through, together with what was committed since.
    junk.unlink()
    store.commit([log.record(write(0, block(1)))])
    store.checkpoint(log.image(), 0)
    assert store.unapplied_bytes == 0
    assert store.read(0, start + BATCH) == log.content(0, start + BATCH)
    # Pages that a trim freed take new writes, although the disk is as full as before.
    with junk.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk_free_bytes(directory) - 64 * BLOCK_SIZE)
    assert node.space.poll()
    apply(store, log, [log.record(trim(0, start // 2))])
    apply(store, log, [log.record(trim(0, 1))])
    assert store.has_room(RESERVE)
    for at in range(0, start // 4, BATCH):
        apply(store, log, [log.record(write(at, *[block(at)] * BATCH))])
    assert store.read(0, start + BATCH) == log.content(0, start + BATCH)
    store.close()
    junk.unlink()
    other = node.create_replica(address(2), LogImage())
    other.close()
    node.delete_replica(address().replica)
    assert not node.space.poll()
    assert ballast.exists()
    node.close()
    assert check_node(directory / "data").problems == []
    print("all held")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
