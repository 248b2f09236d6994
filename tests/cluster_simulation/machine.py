"""The machine as the simulated processes see it: its clocks, its chance, the size of its disk.

All processes share the loop's time. The time of day of each may be off by what a fault made of it. How full the real
disk is would be chance that no seed gives back.
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

from blockstore.units import GIB
from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.processes import CURRENT

#: 2026-01-01, in seconds since 1970.
_BEGIN_S = 1_767_225_600


class Clocks:
    """skew_s: of the time of day, by process name."""

    def __init__(self, loop: SimulationLoop) -> None:
        self._loop = loop
        self.skew_s: dict[str, float] = {}

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


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def _disk_usage(path: object) -> _Usage:
    return _Usage(100 * GIB, GIB, 99 * GIB)


@contextmanager
def simulated_machine(loop: SimulationLoop, seed: int) -> Iterator[Clocks]:
    """In place of the module `time`'s, of what draws chance, and of the disk's size; while this is open."""
    clocks, chance = Clocks(loop), Random(seed)
    random.seed(seed)

    def token_hex(count: int = 16) -> str:
        return chance.randbytes(count).hex()

    with (
        patch.object(time, "monotonic", clocks.monotonic),
        patch.object(time, "clock_gettime", clocks.boot),
        patch.object(time, "time_ns", clocks.day_ns),
        patch.object(time, "time", clocks.day),
        patch.object(secrets, "token_bytes", chance.randbytes),
        patch.object(secrets, "token_hex", token_hex),
        patch.object(os, "urandom", chance.randbytes),
        patch.object(shutil, "disk_usage", _disk_usage),
    ):
        yield clocks
