"""The journal's bytes: the header of a file, the header of a group, the entries behind it.

Everything is little-endian. A file begins with two copies of its header, one in each of its first
two pages; a copy fits a disk sector, so that a crash leaves it old or new, never mixed. Groups
follow, each on a page boundary:

    prefix    56 bytes: magic, version, flags, counts, sizes, the group's number, its first entry's
              number, the body's checksum, and a checksum over prefix and lists
    lists     one item of 80 bytes for each replica with entries in this group, then the same for
              the group before: who loses something where a group's body cannot be read
    body      a table with 8 bytes for each entry, then the entries' payloads
    padding   up to the next page boundary; not covered by any checksum

Both checksums are xxh3-64 seeded with the salt that the file drew for its present incarnation. So
a group of an earlier life of the file fails them, and so does anything that a guest wrote to look
like a group. Invariants: what a count or size claims is bounded before it is believed; groups of
one log have consecutive numbers, and so have their entries.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import xxhash

from blockstore import units
from blockstore.domain import Position, ReplicaId
from blockstore.errors import Corrupt
from blockstore.log import EntryKind, FillingEntry, LogEntry, RecordEntry, TruncateEntry
from blockstore.units import KIB, MIB, Epoch
from blockstore.values import value

PAGE: Final = 4 * KIB
FIRST_OFFSET: Final = 2 * PAGE
"""Where a file's groups begin, behind the two copies of its header."""
MAX_GROUP_BYTES: Final = 4 * MIB
"""Three full records: large enough to carry the disk's bandwidth, small enough to wait behind."""
MAX_GROUP_ENTRIES: Final = 1000
"""Each is a buffer of the group's one pwritev, which takes 1,024."""
MAX_REPLICA_NAME: Final = 24

_VERSION: Final = 1
_CHECKSUM: Final = struct.Struct("<Q")
_FILE: Final = struct.Struct("<4sHHQQQQQQQQQ")
_FILE_MAGIC: Final = b"CJfi"
_GROUP: Final = struct.Struct("<4sHHIIIIQQQ")
_GROUP_MAGIC: Final = b"CJgr"
_ITEM: Final = struct.Struct(f"<{MAX_REPLICA_NAME}sQQQQQQB7x")
_ENTRY: Final = struct.Struct("<HBxI")
_PREFIX_SIZE: Final = _GROUP.size + _CHECKSUM.size
_PREVIOUS_KNOWN: Final = 1


class FileKind(IntEnum):
    """What a file's header makes of it. The numbers are part of the stored format."""

    LOG = 1
    SPARE = 2


@value
class FileHeader:
    """What a file says about itself and about the log before it.

    incarnation grows by one with each file begun in the directory and orders the files; salt seeds
    the checksums. The file's groups are first_group and on, its entries first_entry and on; those up to
    synced_group and synced_entry were durable before this header was. The log before ends in the file
    `previous` at the offset previous_end: whatever lies there or behind is not part of it. Files from
    incarnation `oldest` on were still needed when this was written. Of a SPARE file only incarnation
    and oldest mean anything.
    """

    kind: FileKind
    incarnation: int
    salt: int
    first_group: int
    first_entry: int
    synced_group: int
    synced_entry: int
    previous: int
    previous_end: int
    oldest: int


@value
class GroupItem:
    """What a group holds of one replica.

    position: the highest that the replica may have acked with it. number: that of its last entry here;
    before: that of its last entry in an earlier group, 0 where the writer knew of none. first, last:
    the sequences that its log gains, both 0 where it gains none. restarts: a filling entry is among
    them, so nothing earlier belongs to its log any more.
    """

    replica: ReplicaId
    position: Position
    number: int
    before: int
    first: int
    last: int
    restarts: bool


Items = tuple[GroupItem, ...]


@value
class GroupHeader:
    """A group's header as it was read; previous is None where its writer did not know the group before."""

    number: int
    first_entry: int
    entry_count: int
    body_size: int
    body_checksum: int
    items: Items
    previous: Items | None

    @property
    def last_entry(self) -> int:
        return self.first_entry + self.entry_count - 1

    @property
    def header_size(self) -> int:
        return header_size(len(self.items), len(self.previous or ()))

    @property
    def size_bytes(self) -> int:
        """What the group takes of its file, padding included."""
        return round_up(self.header_size + self.body_size)


@value
class StoredEntry:
    """One entry of a group's body, not decoded."""

    number: int
    replica: ReplicaId
    kind: int
    payload: memoryview


def round_up(size_bytes: int) -> int:
    """`size_bytes` up to the next page boundary."""
    return -(-size_bytes // PAGE) * PAGE


def header_size(item_count: int, previous_count: int) -> int:
    """The bytes of a group's header with lists of those lengths."""
    return _PREFIX_SIZE + _ITEM.size * (item_count + previous_count)


def checksum(buffers: Iterable[bytes | memoryview], salt: int) -> int:
    """xxh3-64 over the buffers in order, seeded with a file's salt."""
    digest = xxhash.xxh3_64(seed=salt)
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest()


def encode_file_header(header: FileHeader) -> bytes:
    """Both copies of a file's header, each in a page of its own."""
    fields = _FILE.pack(
        _FILE_MAGIC, _VERSION, header.kind, header.incarnation, header.salt, header.first_group, header.first_entry,
        header.synced_group, header.synced_entry, header.previous, header.previous_end, header.oldest,
    )  # fmt: skip
    copy = fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))
    return copy.ljust(PAGE, b"\0") * 2


def decode_file_header(page: bytes) -> FileHeader | None:
    """The copy that starts this page; None where there is none. Raises Corrupt for a format we do not know."""
    if len(page) < _FILE.size + _CHECKSUM.size or page[: len(_FILE_MAGIC)] != _FILE_MAGIC:
        return None
    (wanted,) = _CHECKSUM.unpack_from(page, _FILE.size)
    if xxhash.xxh3_64_intdigest(page[: _FILE.size]) != wanted:
        return None
    _, version, kind, *numbers = _FILE.unpack_from(page)
    if version != _VERSION or kind not in FileKind.__members__.values():
        raise Corrupt(f"a journal file of version {version} and kind {kind}: this program reads version {_VERSION}")
    return FileHeader(FileKind(kind), *numbers)


@dataclass(slots=True)
class _Growing:
    """An item while its group is gathered."""

    replica: ReplicaId
    position: Position
    number: int
    before: int
    first: int = 0
    last: int = 0
    restarts: bool = False

    def take(self, entry: LogEntry, position: Position, number: int) -> None:
        """One more entry of its replica."""
        self.number = number
        self.position = max(self.position, position)
        match entry:
            case RecordEntry(record):
                if not (self.first and self.first <= record.sequence <= self.last + 1):
                    self.first = record.sequence
                self.last = record.sequence
            case TruncateEntry(after):
                self._keep_up_to(after)
            case FillingEntry(filling):
                self._keep_up_to(0)
                self.restarts = True
                self.position = max(self.position, filling.floor)

    def grown(self) -> GroupItem:
        """The item as it is now."""
        return GroupItem(self.replica, self.position, self.number, self.before, self.first, self.last, self.restarts)

    def _keep_up_to(self, after: int) -> None:
        self.last = min(self.last, after)
        if self.last < self.first:
            self.first = self.last = 0


class Draft:
    """A group being gathered: all of it that does not depend on the file it will lie in.

    number and first_entry are the group's; previous lists the group before, None where that is not
    known; before gives the number of a replica's last entry in earlier groups.
    """

    def __init__(self, number: int, first_entry: int, previous: Items | None) -> None:
        self.number = number
        self.first_entry = first_entry
        self.previous = previous
        self.payloads: list[bytes | memoryview] = []
        self._table: list[tuple[int, int]] = []
        self._replicas: dict[ReplicaId, int] = {}
        self._items: list[_Growing] = []
        self._grown: Items | None = ()
        """What `items` said, unless more came since."""
        self._body_size = 0

    def __len__(self) -> int:
        return len(self.payloads)

    @property
    def items(self) -> Items:
        if self._grown is None:
            self._grown = tuple([item.grown() for item in self._items])
        return self._grown

    @property
    def size_bytes(self) -> int:
        """What the group will take of a file."""
        return round_up(header_size(len(self._items), len(self.previous or ())) + self._body_size)

    def size_with(self, payload_size: int, entry_count: int) -> int:
        """What size_bytes may be at most with that many entries more, of as many replicas."""
        lists = header_size(len(self._items) + entry_count, len(self.previous or ()))
        return round_up(lists + self._body_size + entry_count * _ENTRY.size + payload_size)

    def add(
        self,
        replica: ReplicaId,
        entry: LogEntry,
        position: Position,
        encoded: tuple[EntryKind, bytes | memoryview],
        before: int,
    ) -> int:
        """Take one entry in; returns its number."""
        kind, payload = encoded
        number = self.first_entry + len(self.payloads)
        index = self._replicas.setdefault(replica, len(self._items))
        if index == len(self._items):
            self._items.append(_Growing(replica, position, number, before))
        self._items[index].take(entry, position, number)
        self._grown = None
        self._table.append((index, kind))
        self.payloads.append(payload)
        self._body_size += _ENTRY.size + len(payload)
        return number

    def encode(self, salt: int) -> list[bytes | memoryview]:
        """The group's bytes as buffers for one pwritev, padding included."""
        table = b"".join(
            _ENTRY.pack(index, kind, len(payload))
            for (index, kind), payload in zip(self._table, self.payloads, strict=True)
        )
        body: list[bytes | memoryview] = [table, *self.payloads]
        header = GroupHeader(
            self.number, self.first_entry, len(self.payloads), self._body_size, checksum(body, salt),
            self.items, self.previous,
        )  # fmt: skip
        padding = b"\0" * (header.size_bytes - header.header_size - header.body_size)
        return [encode_group_header(header, salt) + table, *self.payloads, padding]


def encode_group_header(header: GroupHeader, salt: int) -> bytes:
    """Prefix and lists, under their own checksum."""
    flags = 0 if header.previous is None else _PREVIOUS_KNOWN
    previous = header.previous or ()
    prefix = _GROUP.pack(
        _GROUP_MAGIC, _VERSION, flags, len(header.items), len(previous), header.entry_count, header.body_size,
        header.number, header.first_entry, header.body_checksum,
    )  # fmt: skip
    lists = b"".join(map(_encode_item, (*header.items, *previous)))
    return b"".join((prefix, _CHECKSUM.pack(checksum((prefix, lists), salt)), lists))


def group_header_size(start: bytes | memoryview) -> int | None:
    """How long the header that starts here claims to be; None where these are not a group's first bytes."""
    if len(start) < _PREFIX_SIZE or start[: len(_GROUP_MAGIC)] != _GROUP_MAGIC:
        return None
    _, version, _, own, previous, entries, body_size, *_ = _GROUP.unpack_from(start)
    size = header_size(own, previous)
    bounded = 0 < own <= entries <= MAX_GROUP_ENTRIES and previous <= MAX_GROUP_ENTRIES
    return size if version == _VERSION and bounded and size + body_size <= MAX_GROUP_BYTES else None


def decode_group_header(encoded: bytes | memoryview, salt: int) -> GroupHeader | None:
    """The header in these bytes, as many as group_header_size said; None where its checksum fails."""
    view = memoryview(encoded)
    lists = view[_PREFIX_SIZE:]
    (wanted,) = _CHECKSUM.unpack_from(view, _GROUP.size)
    if checksum((view[: _GROUP.size], lists), salt) != wanted:
        return None
    _, _, flags, own, _, entries, body_size, number, first_entry, body_checksum = _GROUP.unpack_from(view)
    items = tuple(map(_decode_item, _ITEM.iter_unpack(lists)))
    previous = items[own:] if flags & _PREVIOUS_KNOWN else None
    return GroupHeader(number, first_entry, entries, body_size, body_checksum, items[:own], previous)


def stored_entries(header: GroupHeader, body: bytes | memoryview) -> Iterator[StoredEntry]:
    """The entries of a body that passed its checksum, in order."""
    view = memoryview(body)
    at = header.entry_count * _ENTRY.size
    for i, (index, kind, size) in enumerate(_ENTRY.iter_unpack(view[:at])):
        yield StoredEntry(header.first_entry + i, header.items[index].replica, kind, view[at : at + size])
        at += size


def _encode_item(item: GroupItem) -> bytes:
    name = item.replica.encode("ascii")
    return _ITEM.pack(name, *item.position, item.number, item.before, item.first, item.last, item.restarts)


def _decode_item(fields: tuple[bytes, int, int, int, int, int, int, int]) -> GroupItem:
    name, epoch, sequence, number, before, first, last, restarts = fields
    replica = ReplicaId(name.rstrip(b"\0").decode("ascii"))
    position = Position(Epoch(epoch), units.Sequence(sequence))
    return GroupItem(replica, position, number, before, first, last, bool(restarts))
