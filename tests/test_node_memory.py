"""What an idle replica takes of a node's memory: next to nothing, so that a node can have a thousand of them."""

import subprocess
import sys
from pathlib import Path

import pytest

#: Opens so many replicas, each after it was made and closed, and prints the KiB of memory that each of them took.
_OPEN = """
import sys
from pathlib import Path
from blockstore.daemon import HEAP_UP_TO_BYTES, keep_freed_memory
from blockstore.domain import ReplicaAddress, ReplicaId, SegmentNumber, VolumeId
from blockstore.log import LogImage
from blockstore.node.daemon import HEAP_UP_TO_BYTES as NODE_HEAP_UP_TO_BYTES
from blockstore.storage.replica_store import ReplicaStore
keep_freed_memory(NODE_HEAP_UP_TO_BYTES if sys.argv[1] == "node" else HEAP_UP_TO_BYTES)
def taken_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
address = ReplicaAddress(VolumeId("vol-0123456789abcdef0"), SegmentNumber(0), ReplicaId("rep-0123456789abcdef0"))
before, stores, count = taken_kib(), [], 20
for number in range(count):
    directory = Path(sys.argv[2]) / str(number)
    ReplicaStore.create(directory, address, LogImage()).close()
    stores.append(ReplicaStore.open(directory))
print((taken_kib() - before) // count)
"""


def taken_kib(heap: str, directory: Path) -> int:
    command = [sys.executable, "-c", _OPEN, heap, str(directory / heap)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_an_open_replica_takes_no_megabytes(tmp_path: Path) -> None:
    assert taken_kib("node", tmp_path) < 256
    assert taken_kib("any daemon", tmp_path) > 1024
