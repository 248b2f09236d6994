"""What a volume may show, from what it has acknowledged: the judge of the crash tests.

The unit is a sector of 512 bytes, so that requests smaller than a block are judged too. A sector
holds the stamp of one write: its version and its own number, repeated. Two rules:

- A sector shows the last acknowledged write, or one whose outcome the client does not know (its
  connection ended, or the server answered with an error) and which was sent since.
- Once a read has shown which of them, it stays so: a write that was not there does not come back.

The second rule needs that no write of unknown outcome is still under way when the read is sent: a
connection that has ended is dropped by the server before another is served, and a read waits for
the writes that overlap it.
"""

import struct
from dataclasses import dataclass, field
from typing import Final

from blockstore.units import BLOCK_SIZE

SECTOR_SIZE: Final = 512
BLOCK_SECTORS: Final = BLOCK_SIZE // SECTOR_SIZE
_STAMP: Final = struct.Struct("<QQ")
#: What was trimmed or zeroed, or never written.
ZERO: Final = 0


def stamp(version: int, sector: int) -> bytes:
    """The content of one sector: all zero for version 0."""
    if version == ZERO:
        return bytes(SECTOR_SIZE)
    return _STAMP.pack(version, sector) * (SECTOR_SIZE // _STAMP.size)


class Wrong(AssertionError):
    """A read showed what no acknowledged or open write explains."""


@dataclass
class Model:
    """Of the sectors from `first` on; one client at a time writes to a sector."""

    first: int
    count: int
    _known: list[int] = field(init=False)
    _open: dict[int, set[int]] = field(init=False, default_factory=dict)
    _last_version: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._known = [ZERO] * self.count

    def next_version(self) -> int:
        """Never given before; ZERO is for trims and zeroes."""
        self._last_version += 1
        return self._last_version

    def content(self, version: int, sector: int, count: int) -> bytes:
        """What a write of `version` to these sectors carries."""
        return b"".join(stamp(version, number) for number in range(sector, sector + count))

    def acknowledged(self, version: int, sector: int, count: int) -> None:
        """The write is done; what was open there was sent before, and is covered."""
        for number in range(sector, sector + count):
            self._known[number - self.first] = version
            self._open.pop(number, None)

    def trimmed(self, sector: int, count: int) -> None:
        """The trim is done: whole blocks are zero, what is left at the edges is zero or stays as it was."""
        end = sector + count
        first, last = -(-sector // BLOCK_SECTORS) * BLOCK_SECTORS, end // BLOCK_SECTORS * BLOCK_SECTORS
        if first >= last:
            self.unknown(ZERO, sector, count)
            return
        self.unknown(ZERO, sector, first - sector)
        self.acknowledged(ZERO, first, last - first)
        self.unknown(ZERO, last, end - last)

    def unknown(self, version: int, sector: int, count: int) -> None:
        """The write may or may not have been done."""
        for number in range(sector, sector + count):
            self._open.setdefault(number, set()).add(version)

    def check(self, sector: int, data: bytes) -> None:
        """`data` is what a read of these sectors showed. Raises Wrong, with the first sector that is."""
        for number in range(sector, sector + len(data) // SECTOR_SIZE):
            at = (number - sector) * SECTOR_SIZE
            self._check_sector(number, data[at : at + SECTOR_SIZE])

    def _check_sector(self, sector: int, found: bytes) -> None:
        known = self._known[sector - self.first]
        if not self._open and found == stamp(known, sector):
            return
        for version in {known, *self._open.get(sector, ())}:
            if found == stamp(version, sector):
                self._known[sector - self.first] = version
                self._open.pop(sector, None)
                return
        shown = _STAMP.unpack(found[: _STAMP.size])
        raise Wrong(
            f"sector {sector} (block {sector // 8}) shows version {shown[0]} of sector {shown[1]}, expected "
            f"version {known} or one of {sorted(self._open.get(sector, ()))}"
        )
