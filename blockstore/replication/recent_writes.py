"""Which blocks were written lately, and by which record: what a replica's tables may not show yet (rule 4).

Tables show a replica as of its last checkpoint. A read out of them shows a block as it is now if they reflect the last
record that touched it. That is known exactly for what is remembered here; of all that came before it is known that no
record beyond `floor` touched it.

What tables reflect is forgotten in two halves, so that a checkpoint costs nothing for each block: the older half goes
once they reflect its last record, and what came since is the older half then.
"""

from dataclasses import dataclass, field
from typing import Final

from blockstore.record import Operation
from blockstore.units import BLOCK_SIZE, MAX_RECORD_PAYLOAD

#: Blocks of each half: what small writes make a checkpoint due for (blockstore/storage/memtable.py) and three times as
#: much that comes until it is through, in some 18 MiB. More are not remembered one by one.
_MAX_BLOCKS: Final = 131_072
#: An operation on more blocks (a trim) is remembered as a range.
_RANGE_BLOCKS: Final = MAX_RECORD_PAYLOAD // BLOCK_SIZE
#: Few: each read looks at all of them.
_MAX_RANGES: Final = 64


@dataclass(slots=True)
class _Half:
    """last: no record in it is behind that one."""

    last: int = 0
    blocks: dict[int, int] = field(default_factory=dict)
    ranges: list[tuple[int, int, int]] = field(default_factory=list)
    """First block, the one after the last, record."""

    def newest(self, start: int, end: int) -> int:
        newest = 0
        if self.blocks:
            if end - start == 1:
                newest = self.blocks.get(start, 0)
            elif not self.blocks.keys().isdisjoint(range(start, end)):
                newest = max(self.blocks.get(block, 0) for block in range(start, end))
        for first, after, sequence in self.ranges:
            if first < end and start < after:
                newest = max(newest, sequence)
        return newest


class RecentWrites:
    """Of one attachment; see the module. floor: a sequence."""

    def __init__(self, floor: int) -> None:
        self._floor = floor
        self._young = _Half()
        self._old = _Half()

    def note(self, sequence: int, operation: Operation) -> None:
        """This record, the newest one, does that."""
        if not operation.on_blocks:
            return
        young = self._young
        if operation.count <= _RANGE_BLOCKS:
            if operation.count == 1:
                young.blocks[operation.start] = sequence
            else:
                young.blocks.update(dict.fromkeys(range(operation.start, operation.end), sequence))
        else:
            young.ranges.append((operation.start, operation.end, sequence))
        young.last = sequence
        if len(young.blocks) > _MAX_BLOCKS or len(young.ranges) > _MAX_RANGES:
            self._floor = sequence
            self._young, self._old = _Half(), _Half()

    def newest(self, start: int, count: int) -> int:
        """No record behind this one touched any of these blocks."""
        end = start + count
        return max(self._floor, self._young.newest(start, end), self._old.newest(start, end))

    def reflected(self, sequence: int) -> None:
        """The tables that are read reflect everything up to this record; what they reflect never falls."""
        while self._old.last <= sequence and (self._old.last or self._young.last):
            self._floor = max(self._floor, self._old.last)  # another replica's tables may be behind that
            self._old, self._young = self._young, _Half()
