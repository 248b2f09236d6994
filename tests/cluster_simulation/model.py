"""What a volume's blocks may show: the judge of reads and of snapshots.

Each write has a number, and the number fills its blocks. Of most blocks one client is the only writer; then
linearizability is: a read shows the last write that was acknowledged, or one with an unknown end (its connection
broke, or it had an error) that came after it; once such a one was seen, or a later write was acknowledged, nothing
before it is ever seen again. The first HOT blocks are written and read by every client, over connections to any
front-end that answers: their requests are kept, and judged together at the end (tests/faults/linearizable.py). A
snapshot is a read of all blocks in one moment.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from blockstore.units import BLOCK_SIZE
from tests.faults.linearizable import Request, check_register

HOT: Final = 4
#: The one behind these is written by a single client of all volumes, one volume after the other (in_turn.py).
IN_TURN: Final = HOT


@dataclass(slots=True)
class BlockHistory:
    """values: of all writes in order, 0 for zeroes; begun, ended: when. low: the newest that a reader must see."""

    values: list[int] = field(default_factory=lambda: [0])
    begun: list[float] = field(default_factory=lambda: [-math.inf])
    ended: list[float] = field(default_factory=lambda: [-math.inf])
    low: int = 0

    def begin(self, value: int, now: float) -> int:
        self.values.append(value)
        self.begun.append(now)
        self.ended.append(math.inf)
        return len(self.values) - 1

    def acknowledged(self, write: int, now: float) -> None:
        self.ended[write] = now
        self.low = max(self.low, write)

    def saw(self, value: int, where: str) -> None:
        """A read of the present content. Raises AssertionError where it cannot be."""
        possible = [write for write in range(self.low, len(self.values)) if self.values[write] == value]
        assert possible, f"{where} reads {value}: expected one of {self.values[self.low :]}"
        self.low = max(self.low, possible[0])

    def moment(self, value: int, low: int, high: int) -> tuple[float, float]:
        """Between which moments the block held `value`, a write from `low` to `high`: (not before, not after).

        Raises AssertionError where none of these wrote it.
        """
        writes = [write for write in range(low, high + 1) if self.values[write] == value]
        assert writes, f"holds {value}, expected one of {self.values[low : high + 1]}"
        later = (ended for write, ended in enumerate(self.ended) if write > writes[-1])
        return self.begun[writes[0]], min(later, default=math.inf)


@dataclass(slots=True)
class HotBlock:
    """One that many write: what they asked and were answered."""

    initial: int = 0
    requests: list[Request] = field(default_factory=list)

    def check(self) -> None:
        """Raises NotLinearizable."""
        check_register(self.requests, self.initial)


class VolumeModel:
    """Of one volume: the history of each block. content: what it begins with, as numbers; zeroes where it is none."""

    def __init__(self, blocks: int, content: Sequence[int] = (), last_number: int = 0) -> None:
        content = [*content, *([0] * (blocks - len(content)))]
        self.hot = [HotBlock(each) for each in content[:HOT]]
        self.blocks = [BlockHistory([each]) for each in content]
        self.asked_blocks = blocks
        """What it may have grown to by now, though who asked for that was not told."""
        self.operations = 0
        self._number = last_number

    @property
    def last_number(self) -> int:
        return self._number

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def grow(self, blocks: int) -> None:
        self.blocks += [BlockHistory() for _ in range(blocks - len(self.blocks))]

    def mark(self) -> list[int]:
        """What is acknowledged by now, for `moment`."""
        return [block.low for block in self.blocks]

    def begun(self) -> list[int]:
        """What is begun by now."""
        return [len(block.values) - 1 for block in self.blocks]

    def saw(self, number: int, value: int, asked_at: float, now: float, where: str) -> None:
        """A read of the present content. Raises AssertionError where it cannot be, as far as that is seen at once."""
        if number < HOT:
            self.hot[number].requests.append(Request(False, value, asked_at, now))
        else:
            self.blocks[number].saw(value, where)

    def moment(self, content: list[int], low: list[int], high: list[int], what: str) -> tuple[float, float]:
        """Between which moments all of `content` was there: (not before, not after). Raises AssertionError for none."""
        not_before, not_after = -math.inf, math.inf
        for number in range(HOT, len(content)):
            first = low[number] if number < len(low) else 0
            try:
                begun, ended = self.blocks[number].moment(content[number], first, high[number])
            except AssertionError as error:
                raise AssertionError(f"{what}: block {number} {error}") from error
            not_before, not_after = max(not_before, begun), min(not_after, ended)
        assert not_before <= not_after, f"{what} is of no moment: {not_before} to {not_after}"
        return not_before, not_after

    def saw_hot(self, content: list[int], asked_at: float, sealed_at: float) -> None:
        """A snapshot, taken between the two, holds these."""
        for block, value in zip(self.hot, content, strict=False):
            block.requests.append(Request(False, value, asked_at, sealed_at))

    def check(self) -> None:
        """What only the whole history tells. Raises NotLinearizable."""
        for block in self.hot:
            block.check()


def filled(value: int) -> bytes:
    return value.to_bytes(8, "little") * (BLOCK_SIZE // 8)


def value_of(block: bytes, where: str) -> int:
    """Raises AssertionError where the block is torn."""
    value = int.from_bytes(block[:8], "little")
    assert block == filled(value), f"{where} is torn: {block[:8].hex()} and others"
    return value
