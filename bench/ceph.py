"""Ceph RBD: a monitor and three storage daemons on this machine, and fio's own engine over librbd.

The image is replicated three times, and the client's cache is off, as Cairn has none. Objects, placement groups and
everything else are as Ceph's defaults are; BlueStore lies in files on the disk that is measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.fio import Disk
from bench.serving import Serving
from blockstore.config import split_address
from blockstore.units import GIB, MIB
from tests.ceph_cluster import PROGRAMS, CephCluster
from tests.loopback import free_address

CEPH_PROGRAMS: Final = (*PROGRAMS, "rbd")
_DISKS: Final = 3
_POOL, _IMAGE = "bench", "volume"
#: For 3 daemons and one pool, by Ceph's rule of about a hundred for each daemon, over three copies.
_PLACEMENT_GROUPS: Final = 64
_MEMORY_BYTES: Final = GIB
_NO_CACHE: Final = "rbd_cache = false\n"


@contextmanager
def serve_rbd(directory: Path, size: int) -> Iterator[Serving]:
    """An image of `size` bytes."""
    cluster = CephCluster(
        directory,
        split_address(free_address())[0],
        disks=_DISKS,
        replicas=_DISKS,
        memory_bytes=_MEMORY_BYTES,
        disk_bytes=4 * size + 4 * GIB,
        more=_NO_CACHE,
    )
    try:
        cluster.start()
        cluster.run("ceph", "osd", "pool", "create", _POOL, str(_PLACEMENT_GROUPS))
        cluster.run("rbd", "pool", "init", _POOL)
        cluster.run("rbd", "create", f"{_POOL}/{_IMAGE}", "--size", f"{size // MIB}M")
        pids = {name: daemon.pid for name, daemon in cluster.daemons.items()}
        commands = tuple(" ".join(map(str, daemon.command)) for daemon in cluster.daemons.values())
        options = ("--ioengine=rbd", f"--pool={_POOL}", f"--rbdname={_IMAGE}", "--clientname=admin")
        yield Serving(Disk(options, (("CEPH_CONF", str(cluster.config)),)), pids, commands)
    finally:
        cluster.end()
