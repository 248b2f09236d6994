"""What is measured against what: Cairn and its peers, each behind a small adapter that starts and stops it.

Each target serves one empty volume of a given size on the loopback while its block lasts. What it promises stands in
the report: Ceph replicates as Cairn does; the others keep one copy, and say how fast the disk, NBD and fio are here.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import nbd_servers
from bench.ceph import CEPH_PROGRAMS, serve_rbd
from bench.default_cluster import default_cluster
from bench.fio import Disk
from bench.serving import Serving
from bench.space import measure_nodes
from tests.programs import find_program


@dataclass(frozen=True)
class Target:
    """promise: what it has done when it acknowledges a write. programs: from outside, that it needs.

    start: takes a directory for its data, and the volume's size in bytes.
    """

    name: str
    promise: str
    programs: tuple[str, ...]
    start: Callable[[Path, int], AbstractContextManager[Serving]]

    def missing(self) -> list[str]:
        """Programs that are not installed."""
        return [name for name in self.programs if find_program(name) is None]


@contextmanager
def _cairn(directory: Path, size: int) -> Iterator[Serving]:
    with default_cluster(directory) as cluster:
        volume = cluster.create(size)
        uri = cluster.attach(volume)
        pids = {daemon.name: daemon.pid for daemon in cluster.daemons}
        nodes = [node.directory for node in cluster.nodes]
        commands = tuple(" ".join(map(str, daemon.command)) for daemon in cluster.daemons)
        yield Serving(Disk.nbd(uri), pids, commands, lambda user_bytes: measure_nodes(nodes, user_bytes))


ALL: Final = (
    Target("cairn", "3 copies, on disk on 2 nodes before a write is acknowledged", (), _cairn),
    Target("ceph-rbd", "3 copies, on disk on all 3 before a write is acknowledged", CEPH_PROGRAMS, serve_rbd),
    Target(
        "qemu-nbd-directsync",
        "1 copy, on disk before a write is acknowledged",
        ("qemu-nbd",),
        nbd_servers.qemu_nbd("raw", "directsync"),
    ),
    Target(
        "qemu-nbd-writeback",
        "1 copy, in the page cache until a flush",
        ("qemu-nbd",),
        nbd_servers.qemu_nbd("raw", "writeback"),
    ),
    Target(
        "qcow2-directsync",
        "1 copy in a qcow2 image, on disk before a write is acknowledged",
        ("qemu-nbd", "qemu-img"),
        nbd_servers.qemu_nbd("qcow2", "directsync"),
    ),
    Target(
        "qcow2-writeback",
        "1 copy in a qcow2 image, in the page cache until a flush",
        ("qemu-nbd", "qemu-img"),
        nbd_servers.qemu_nbd("qcow2", "writeback"),
    ),
    Target("nbd-server", "1 copy, in the page cache until a flush", ("nbd-server",), nbd_servers.nbd_server),
    Target("nbdkit-file", "1 copy, in the page cache until a flush", ("nbdkit",), nbd_servers.nbdkit_file),
    Target("nbdkit-memory", "1 copy in memory, never on disk", ("nbdkit",), nbd_servers.nbdkit_memory),
)
TARGETS: Final = {each.name: each for each in ALL}
