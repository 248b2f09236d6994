"""The machine as the simulated processes see it: its clocks, its chance, the size of its disk.

All processes share the loop's time. The time of day of each may be off by what a fault made of it. How full the real
disk is would be chance that no seed gives back; a simulated one has room or none, as nodes are told when they ask (what
LMDB does on a full disk is shown in tests/test_storage_full.py).
"""

import os
import random
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import NamedTuple
from unittest.mock import patch

from blockstore.units import BLOCK_SIZE, GIB
from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.processes import CURRENT

#: 2026-01-01, in seconds since 1970.
_BEGIN_S = 1_767_225_600
_DISK_BYTES, _FREE_BYTES = 100 * GIB, 99 * GIB


class Machines:
    """skew_s: of the time of day, by process name. full: the processes whose disks have no room."""

    def __init__(self, loop: SimulationLoop) -> None:
        self._loop = loop
        self.skew_s: dict[str, float] = {}
        self.full: set[str] = set()

    def monotonic(self) -> float:
        return self._loop.time()

    def boot(self, clock: int) -> float:
        return self._loop.time()

    def day_ns(self) -> int:
        process = CURRENT.get()
        skew_s = self.skew_s.get(process.name, 0.0) if process is not None else 0.0
        return int((_BEGIN_S + self._loop.time() + skew_s) * 1e9)

    def day(self) -> float:
        return self.day_ns() / 1e9

    def free_bytes(self) -> int:
        process = CURRENT.get()
        return 0 if process is not None and process.name in self.full else _FREE_BYTES

    def usage(self, path: object) -> "_Usage":
        free = self.free_bytes()
        return _Usage(_DISK_BYTES, _DISK_BYTES - free, free)

    def status(self, path: object) -> "_Status":
        return _Status(self.free_bytes() // BLOCK_SIZE, BLOCK_SIZE)


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


class _Status(NamedTuple):
    """Of a file system, as far as anybody asks."""

    f_bavail: int
    f_frsize: int


@contextmanager
def simulated_machine(loop: SimulationLoop, seed: int) -> Iterator[Machines]:
    """In place of the module `time`'s, of what draws chance, and of the disk's size; while this is open."""
    machines, chance = Machines(loop), Random(seed)
    random.seed(seed)

    def token_hex(count: int = 16) -> str:
        return chance.randbytes(count).hex()

    with (
        patch.object(time, "monotonic", machines.monotonic),
        patch.object(time, "clock_gettime", machines.boot),
        patch.object(time, "time_ns", machines.day_ns),
        patch.object(time, "time", machines.day),
        patch.object(secrets, "token_bytes", chance.randbytes),
        patch.object(secrets, "token_hex", token_hex),
        patch.object(os, "urandom", chance.randbytes),
        patch.object(shutil, "disk_usage", machines.usage),
        patch.object(os, "statvfs", machines.status),
        patch.object(os, "fstatvfs", machines.status),
    ):
        yield machines
