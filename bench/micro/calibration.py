"""What a figure is compared with, so that a baseline taken on one machine says something on another.

Beside each figure a loop is timed whose cost nobody changes, right before it and right after it. Their ratio is about
the same on a slow machine as on a fast one, and while others use the machine as while nobody does. By default that loop
is what the hot path consists of: calls, small objects, struct, memory copied, checksums. Where a figure is of a disk,
the benchmark names a loop of its own (`Calibration.by`), which is timed within its test.
"""

import struct
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import xxhash

from blockstore.units import BLOCK_SIZE

#: Longer than another process holds a core at a time.
CALIBRATED_S: Final = 0.15
_HEADER: Final = struct.Struct(">IHHQQI")


class _Item(NamedTuple):
    number: int
    payload: bytes


def typical_work() -> int:
    """Some 150 us where the baseline was made."""
    content, found, total = bytes(BLOCK_SIZE), {}, 0
    for number in range(200):
        header = _HEADER.pack(1, 2, 3, number, number * BLOCK_SIZE, BLOCK_SIZE)
        _, _, _, cookie, _, length = _HEADER.unpack(header)
        found[cookie] = _Item(number, header + content)
        total += length
    return total + sum(xxhash.xxh3_64_intdigest(item.payload, item.number) & 1 for item in found.values())


class Calibration:
    """loop: what is timed. seconds: of one call of it, the least that was seen."""

    def __init__(self, for_s: float) -> None:
        """for_s: how long a loop is repeated each time; once where it is 0."""
        self.loop: Callable[[], object] = typical_work
        self.seconds = float("inf")
        self._for_s = for_s

    def by(self, loop: Callable[[], object]) -> None:
        """This figure is compared with another loop, timed here and now."""
        self.loop = loop
        self.seconds = self._least_s()

    def before_and_after(self) -> None:
        """Called twice; the lesser counts, as what others do meanwhile only adds. Nothing where `by` was called."""
        if self.loop is typical_work:
            self.seconds = min(self.seconds, self._least_s())

    def _least_s(self) -> float:
        least, ends = float("inf"), time.perf_counter() + self._for_s
        while least == float("inf") or time.perf_counter() < ends:
            began = time.perf_counter()
            self.loop()
            least = min(least, time.perf_counter() - began)
        return least
