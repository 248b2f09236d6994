"""What of a node survives its crash: the journal, in groups, and the tables.

One group is on its way to the disk at a time. A crash finds it there whole or not at all: a torn one
fails its checksum and counts as never written. What a checkpoint made needless is released. Rot may
take a durable group out of the middle: what the journal's headers say of it becomes the replica's
floor, or nothing is known of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockstore.domain import Position
from blockstore.log import (
    UNKNOWN_FLOOR,
    FillingEntry,
    LogEntry,
    LogImage,
    RecordEntry,
    SealEntry,
    TruncateEntry,
    WholeEntry,
)
from blockstore.units import Epoch
from tests.simulation.model_tables import Tables


@dataclass(frozen=True, slots=True)
class Group:
    """One write and one sync. number: of its last entry. highest: the position the header lists."""

    number: int
    entries: tuple[LogEntry, ...]
    highest: Position


class Disk:
    """A replica's part of a node's disk. damage: the floor that a start finds, None if all is well."""

    def __init__(self, image: LogImage) -> None:
        self.tables = Tables(image)
        self.groups: list[Group] = []
        self.last = 0
        self.highest = image.end
        self.damage: Position | None = None

    def write_group(self, entries: Sequence[LogEntry]) -> int:
        """The entries are durable, all of them. Returns the number of the last one."""
        for entry in entries:
            if isinstance(entry, RecordEntry):
                self.highest = max(self.highest, entry.record.position)
            elif isinstance(entry, SealEntry):
                self.highest = max(self.highest, Position(entry.epoch, self.highest.sequence))
            elif isinstance(entry, FillingEntry):
                self.damage = None
        self.last += len(entries)
        self.groups.append(Group(self.last, tuple(entries), self.highest))
        return self.last

    def release(self) -> None:
        """The tables reflect everything up to their mark."""
        self.groups = [group for group in self.groups if group.number > self.tables.mark]

    def entries(self) -> list[LogEntry]:
        """What a start replays behind the tables' image."""
        return [entry for group in self.groups if group.number > self.tables.mark for entry in group.entries]

    def rot(self, index: int, count: int, *, listed: bool) -> None:
        """`count` groups from that index on are unreadable; listed: the headers still say what was in them.

        Behind it only promises count, as in blockstore/storage/journal_replay.py, up to an entry that
        begins a filling: that one remembers the floor.
        """
        behind = self.groups[index + count :]
        del self.groups[index:]
        self.damage = self.highest if listed else UNKNOWN_FLOOR
        for group in behind:
            entries = tuple(kept for entry in group.entries for kept in self._behind_damage(entry))
            self.groups.append(Group(group.number, entries, group.highest))

    def _behind_damage(self, entry: LogEntry) -> tuple[LogEntry, ...]:
        if isinstance(entry, FillingEntry):
            self.damage = None
        if self.damage is None or isinstance(entry, SealEntry):
            return (entry,)
        if isinstance(entry, RecordEntry):
            return (SealEntry(entry.record.position.epoch, entry.record.configuration),)
        return ()

    def suspect(self) -> None:
        """A sync failed: nobody knows what of it is there."""
        self.damage = UNKNOWN_FLOOR

    def backup(self) -> "Disk":
        """An old copy of it, for somebody to put back."""
        copy = Disk(self.tables.image)
        copy.tables = self.tables.copy()
        copy.groups, copy.last, copy.highest, copy.damage = list(self.groups), self.last, self.highest, self.damage
        return copy


@dataclass(frozen=True, slots=True)
class DiskState:
    """What a disk holds, read by a dumb replay.

    floor: None when whole; where a filling that copies nothing rests on records that are lost, above all
    that was seen. log: positions by sequence, from applied on.
    """

    end: Position
    floor: Position | None
    log: dict[int, Position]
    applied: Position
    epoch: Epoch

    @property
    def whole(self) -> bool:
        return self.floor is None

    @property
    def highest(self) -> Position:
        """What the replica must answer for: it never falls. While it fills, its acks count for nothing."""
        return self.end if self.floor is None else self.floor


def read_disk(image: LogImage, entries: Iterable[LogEntry]) -> DiskState:
    """Replay the entries over the image, without the follower's help. What the image reflects changes nothing."""
    applied, filling, epoch, end = image.applied, image.filling, image.epoch, image.end
    log = {int(record.sequence): record.position for record in image.records}
    log[int(applied.sequence)] = applied
    seen, lost = end, False
    for entry in entries:
        match entry:
            case RecordEntry(record):
                seen = max(seen, record.position)
                if record.sequence > applied.sequence and record.previous == end:
                    log[int(record.sequence)] = end = record.position
            case SealEntry(sealed, _):
                epoch = max(epoch, sealed)
            case TruncateEntry(after):
                lost = lost and after > end.sequence
                if applied.sequence <= after <= end.sequence:
                    log = {sequence: position for sequence, position in log.items() if sequence <= after}
                    end = log[max(log)]
            case FillingEntry(filling):
                base, held = filling.base, log.get(int(filling.base.sequence)) == filling.base
                lost = not held and filling.since >= base.sequence > applied.sequence
                if not lost and base.sequence >= applied.sequence:
                    log = {at: position for at, position in log.items() if held and at <= base.sequence}
                    log[int(base.sequence)] = end = base
            case WholeEntry():
                filling = None
    floor = filling.floor if filling else seen if lost else None
    return DiskState(end, floor, log, applied, epoch)
