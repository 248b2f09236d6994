"""Which object holds which frames of which packs.

A pack is what manifests name; an object is where its frames lie just now. At first one object is one pack.
Repacking copies live frames verbatim into a new object, which then holds *parts* of several packs; pack ids
and frame numbers never change, so no manifest is rewritten. An index object says so for some objects: their
entries, and the names of the objects that these replace. What any index replaces is void in all of them,
whatever the order in which they are read; no clock decides. An index that takes the place of others carries on what
they replace, as long as anything lists it, so that it does not matter which of them are deleted before a crash.

Frames of an object lie one after the other from byte 0, parts in order, numbers ascending: offsets are sums of
lengths and are not stored. Source: docs/format.md, "Index".
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from snapshotd.compression import compress, expand
from snapshotd.crypto import NAME_SIZE, SALT_SIZE, DomainKeys, Kind, check_name, name_of, raw_name
from snapshotd.fields import Fields, column, text
from snapshotd.frame import FRAME_BLOCKS, MAX_STORED_FRAME, MIN_STORED_FRAME

#: Frames in one object: bounds a trailer to about 4 MiB where everything compresses to nothing.
MAX_OBJECT_FRAMES: Final = 4096
#: Frame numbers are below this, also in a repacked object.
MAX_FRAME_NUMBER: Final = MAX_OBJECT_FRAMES
#: A pack is about 16 MiB; no object of frames is larger than this, its trailer included.
MAX_OBJECT_SIZE: Final = 64 << 20
#: Entries in one index object: 1 GiB to 64 GiB of packs in an object that is read in one go.
MAX_INDEX_ENTRIES: Final = 4096
MAX_REPLACES: Final = 65_536
MAX_INDEX_CONTENT: Final = 64 << 20


class Frame(NamedTuple):
    """One frame in an object: its number in its pack, where it lies in bytes, and how many blocks it has."""

    number: int
    offset: int
    length: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Part:
    """The frames of one pack in one object, in the order of their numbers.

    pack: the pack's id, 16 bytes. snapshot: the id of the snapshot that the pack was made for.
    numbers, offsets, lengths, blocks: one column each, of the same length (13 bytes a frame in memory).
    """

    pack: bytes
    snapshot: str
    numbers: "array[int]"
    offsets: "array[int]"
    lengths: "array[int]"
    blocks: bytes

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Frame]:
        return map(Frame, self.numbers, self.offsets, self.lengths, self.blocks)

    def find(self, number: int) -> Frame | None:
        """The frame of that number, if it is here."""
        at = bisect_left(self.numbers, number)
        if at == len(self.numbers) or self.numbers[at] != number:
            return None
        return Frame(number, self.offsets[at], self.lengths[at], self.blocks[at])


def make_part(pack: bytes, snapshot: str, frames: Sequence[Frame]) -> Part:
    """The part of these frames, whose numbers ascend."""
    numbers, offsets, lengths, blocks = zip(*frames, strict=True)
    if list(numbers) != sorted(set(numbers)):
        raise ValueError(f"frames of pack {pack.hex()} are not in order")
    return Part(pack, snapshot, array("I", numbers), array("I", offsets), array("I", lengths), bytes(blocks))


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One object of frames. object: its name, SHA-256 in hexadecimal. size: all its bytes, the trailer included."""

    object: str
    size: int
    parts: tuple[Part, ...]

    def part(self, pack: bytes) -> Part | None:
        """The frames of that pack here."""
        return next((part for part in self.parts if part.pack == pack), None)


@dataclass(frozen=True, slots=True)
class Index:
    """One index object. replaces: names (hexadecimal) of objects that are void, and deleted sooner or later."""

    entries: tuple[IndexEntry, ...]
    replaces: tuple[str, ...] = ()


def encode_index(keys: DomainKeys, index: Index, salt: bytes) -> tuple[str, bytes]:
    """(name, stored bytes) of an index object. salt: 16 random bytes, never used before.

    Raises ValueError where it has more than MAX_INDEX_ENTRIES or MAX_REPLACES.
    """
    if len(index.entries) > MAX_INDEX_ENTRIES or len(index.replaces) > MAX_REPLACES:
        raise ValueError(f"an index of {len(index.entries)} entries that replaces {len(index.replaces)}: split it")
    chunks = [len(index.replaces).to_bytes(4, "little"), *map(raw_name, index.replaces)]
    chunks.append(len(index.entries).to_bytes(4, "little"))
    for entry in index.entries:
        chunks += [raw_name(entry.object), entry.size.to_bytes(4, "little"), encode_parts(entry.parts)]
    content = b"".join(chunks)
    if len(content) > MAX_INDEX_CONTENT:
        raise ValueError(f"an index of {len(content)} bytes: at most {MAX_INDEX_CONTENT}; split it")
    stored = keys.seal(Kind.INDEX, b"", compress(content), salt)
    return name_of(stored), stored


def decode_index(keys: DomainKeys, name: str, stored: bytes) -> Index:
    """The index object of that name. Raises Corrupt where the bytes are not it, whole and unchanged."""
    what = f"index {name}"
    check_name(name, stored, what)
    fields = Fields(expand(keys.open(Kind.INDEX, b"", stored, what), MAX_INDEX_CONTENT, what), what)
    replaces = fields.names(fields.number(4, MAX_REPLACES), NAME_SIZE)
    entries = [_decode_entry(fields) for _ in range(fields.number(4, MAX_INDEX_ENTRIES))]
    fields.end()
    return Index(tuple(entries), tuple(raw.hex() for raw in replaces))


def _decode_entry(fields: Fields) -> IndexEntry:
    name, size = fields.take(NAME_SIZE).hex(), fields.number(4, MAX_OBJECT_SIZE)
    parts, end = decode_parts(fields)
    if end > size:
        raise fields.error(f"has frames up to byte {end} in object {name} of {size} bytes")
    return IndexEntry(name, size, parts)


def encode_parts(parts: Sequence[Part]) -> bytes:
    """The parts of one object: count (2), then of each the pack (16), the snapshot, and its frames as columns."""
    chunks = [len(parts).to_bytes(2, "little")]
    for part in parts:
        chunks += [part.pack, text(part.snapshot), len(part).to_bytes(2, "little")]
        chunks += [column(part.numbers, 2), column(part.lengths, 4), column(part.blocks, 1)]
    return b"".join(chunks)


def decode_parts(fields: Fields) -> tuple[tuple[Part, ...], int]:
    """The parts of one object, and the byte behind its last frame. Raises Corrupt."""
    parts: list[Part] = []
    end = frames = 0
    for _ in range(fields.number(2, MAX_OBJECT_FRAMES)):
        part, end = _decode_part(fields, end)
        parts.append(part)
        frames += len(part)
        if frames > MAX_OBJECT_FRAMES:
            raise fields.error(f"has an object of over {MAX_OBJECT_FRAMES} frames")
    if len({part.pack for part in parts}) != len(parts):
        raise fields.error("names one pack twice in one object")
    return tuple(parts), end


def _decode_part(fields: Fields, offset: int) -> tuple[Part, int]:
    pack, snapshot = fields.take(SALT_SIZE), fields.text()
    count = fields.number(2, MAX_OBJECT_FRAMES)
    numbers, lengths, blocks = fields.column(count, 2), fields.column(count, 4), fields.column(count, 1)
    ascending = all(before < after for before, after in pairwise(numbers))
    if not count or not ascending or numbers[-1] >= MAX_FRAME_NUMBER:
        raise fields.error(f"has frame numbers of pack {pack.hex()} that do not ascend up to {MAX_FRAME_NUMBER - 1}")
    if not MIN_STORED_FRAME <= min(lengths) <= max(lengths) <= MAX_STORED_FRAME:
        raise fields.error(f"has a frame of pack {pack.hex()} of {min(lengths)} or {max(lengths)} bytes")
    if not 1 <= min(blocks) <= max(blocks) <= FRAME_BLOCKS:
        raise fields.error(f"has a frame of pack {pack.hex()} with {min(blocks)} or {max(blocks)} blocks")
    offsets = array("I")
    for length in lengths:
        offsets.append(offset)
        offset += length
        if offset > MAX_OBJECT_SIZE:
            raise fields.error(f"has an object of more than {MAX_OBJECT_SIZE} bytes")
    return Part(pack, snapshot, array("I", numbers), offsets, lengths, blocks.tobytes()), offset


class IndexMap:
    """Many index objects as one: where each frame is. Adding one twice, and the order, make no difference."""

    def __init__(self, indexes: Iterable[Index] = ()) -> None:
        self._entries: dict[str, IndexEntry] = {}
        self._packs: dict[bytes, list[IndexEntry]] = {}
        self._replaced: set[str] = set()
        for index in indexes:
            self.add(index)

    def add(self, index: Index) -> None:
        for name in index.replaces:
            self._replaced.add(name)
            self._drop(name)
        for entry in index.entries:
            if entry.object not in self._replaced and entry.object not in self._entries:
                self._entries[entry.object] = entry
                for part in entry.parts:
                    self._packs.setdefault(part.pack, []).append(entry)

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        for part in entry.parts if entry else ():
            left = [other for other in self._packs[part.pack] if other.object != name]
            if left:
                self._packs[part.pack] = left
            else:
                del self._packs[part.pack]

    @property
    def entries(self) -> dict[str, IndexEntry]:
        """By object name, those that are not replaced. Not to be changed."""
        return self._entries

    @property
    def replaced(self) -> frozenset[str]:
        """Names of objects that some index replaces."""
        return frozenset(self._replaced)

    def objects_of(self, pack: bytes) -> Sequence[IndexEntry]:
        """The objects that hold frames of `pack`: rarely more than one; none where it is not known."""
        return self._packs.get(pack, ())
