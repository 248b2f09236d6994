"""Objects of frames: about 16 MiB of them, then a trailer that says what they hold.

    frame, frame ...   one after the other from byte 0, each encrypted under its pack's key
    trailer            a sealed object of its own: of each frame its pack, number, length and the hashes of its blocks,
                       and the snapshot that each pack was made for
    footer             12 bytes: the trailer's length (4), the header of trailers again (8)

The trailer is what the index and the table of hashes are rebuilt from; it is found from the object's end by two
ranged GETs at most. A new pack's id is its salt, drawn at random for this object alone and never used again, also
not when the same blocks are written again after a crash: frames 0, 1, 2 … of it are encrypted under one key with
their numbers as nonces. A repacked object has a salt of its own for its trailer only; its frames are
copied as they are. Source: docs/format.md, "Packs".
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from blockstore.errors import Corrupt
from snapshotd.compression import HEADER_SIZE as BODY_HEADER_SIZE
from snapshotd.compression import compress, expand
from snapshotd.crypto import HASH_SIZE, HEADER_SIZE, SEALED_SIZE, DomainKeys, Kind, check_header, check_name
from snapshotd.fields import Fields
from snapshotd.frame import FRAME_BLOCKS, MAX_STORED_FRAME, MIN_STORED_FRAME, decode_frame
from snapshotd.index import (
    MAX_OBJECT_FRAMES,
    MAX_OBJECT_SIZE,
    Frame,
    IndexEntry,
    Part,
    decode_parts,
    encode_parts,
    make_part,
)

PACK_SIZE: Final = 16 << 20
"""A pack is finished once its frames have this many bytes: `full`."""
FOOTER_SIZE: Final = 4 + HEADER_SIZE
MAX_TRAILER: Final = 8 << 20
"""Of its stored bytes and of its content."""
MIN_TRAILER: Final = SEALED_SIZE + BODY_HEADER_SIZE


@dataclass(frozen=True, slots=True)
class Trailer:
    """What an object of frames holds. hashes: of each part, of each of its frames, of each block in order of slots."""

    parts: tuple[Part, ...]
    hashes: tuple[tuple[tuple[bytes, ...], ...], ...]


class ObjectWriter:
    """Gathers stored frames into one object: a new pack's, or copies of frames of several packs.

    The frames of one pack follow one another, in the order of their numbers. salt: 16 random bytes, never used before;
    where it makes a new pack, that is the pack's id.
    """

    def __init__(self, keys: DomainKeys, salt: bytes) -> None:
        self._keys = keys
        self._salt = salt
        self._buffers: list[bytes] = []
        self._size = 0
        self._packs: list[tuple[bytes, str]] = []
        self._frames: list[list[Frame]] = []
        self._hashes: list[bytes] = []
        self._count = 0
        self._finished = False

    @property
    def size(self) -> int:
        """Bytes of the frames so far."""
        return self._size

    @property
    def full(self) -> bool:
        """Whether it is time to finish it."""
        return self._size >= PACK_SIZE or self._count >= MAX_OBJECT_FRAMES

    def copy(self, pack: bytes, snapshot: str, number: int, stored: bytes, hashes: Sequence[bytes]) -> None:
        """Appends a stored frame. Raises ValueError where it comes out of order, or once full."""
        if self._finished or self.full:
            raise ValueError(f"frame {number} of pack {pack.hex()} for an object that is full or finished")
        _check_frame(pack, number, stored, hashes)
        frames = self._frames_of(pack, snapshot)
        if frames and frames[-1].number >= number:
            raise ValueError(f"frame {number} of pack {pack.hex()} after {frames[-1].number}")
        frames.append(Frame(number, self._size, len(stored), len(hashes)))
        self._hashes += hashes
        self._buffers.append(stored)
        self._size += len(stored)
        self._count += 1

    def _frames_of(self, pack: bytes, snapshot: str) -> list[Frame]:
        """The frames of the last part, which is that pack's."""
        if not self._packs or self._packs[-1] != (pack, snapshot):
            if any(pack == known for known, _ in self._packs):
                raise ValueError(f"frames of pack {pack.hex()} do not follow one another")
            self._packs.append((pack, snapshot))
            self._frames.append([])
        return self._frames[-1]

    def finish(self) -> tuple[str, list[bytes], IndexEntry]:
        """(the object's name, its bytes in pieces, its index entry). Once, and not without a frame.

        On a thread: it hashes all of them.
        """
        if self._finished or not self._count:
            raise ValueError("an object of frames is finished once, and not without a frame")
        self._finished = True
        pairs = zip(self._packs, self._frames, strict=True)
        parts = tuple(make_part(pack, snapshot, frames) for (pack, snapshot), frames in pairs)
        content = encode_parts(parts) + b"".join(self._hashes)
        trailer = self._keys.seal(Kind.TRAILER, b"", compress(content), self._salt)
        footer = len(trailer).to_bytes(4, "little") + Kind.TRAILER.header
        buffers = [*self._buffers, trailer, footer]
        digest = hashlib.sha256()
        for each in buffers:
            digest.update(each)
        entry = IndexEntry(digest.hexdigest(), sum(map(len, buffers)), parts)
        return entry.object, buffers, entry


def _check_frame(pack: bytes, number: int, stored: bytes, hashes: Sequence[bytes]) -> None:
    """Raises ValueError where no reader would take it."""
    if not 1 <= len(hashes) <= FRAME_BLOCKS or any(len(digest) != HASH_SIZE for digest in hashes):
        raise ValueError(f"frame {number} of pack {pack.hex()} with {len(hashes)} hashes")
    if not MIN_STORED_FRAME <= len(stored) <= MAX_STORED_FRAME:
        raise ValueError(f"frame {number} of pack {pack.hex()} with {len(stored)} bytes")


def trailer_range(footer: bytes, object_size: int, what: str) -> tuple[int, int]:
    """(start, length) of the trailer in an object of `object_size` bytes; footer: its last FOOTER_SIZE bytes.

    Raises Corrupt where that is no object of frames.
    """
    check_header(Kind.TRAILER, footer[4:], f"{what}'s footer")
    length = int.from_bytes(footer[:4], "little")
    start = object_size - FOOTER_SIZE - length
    possible = MIN_TRAILER <= length <= MAX_TRAILER and start > 0 and object_size <= MAX_OBJECT_SIZE
    if len(footer) != FOOTER_SIZE or not possible:
        raise Corrupt(f"{what} has {object_size} bytes and a trailer of {length}: that cannot be")
    return start, length


def decode_trailer(keys: DomainKeys, stored: bytes, start: int, what: str) -> Trailer:
    """The trailer that begins at byte `start` of its object, where its frames end. Raises Corrupt."""
    fields = Fields(expand(keys.open(Kind.TRAILER, b"", stored, what), MAX_TRAILER, what), what)
    parts, end = decode_parts(fields)
    hashes = tuple(tuple(tuple(fields.names(count, HASH_SIZE)) for count in part.blocks) for part in parts)
    fields.end()
    if end != start:
        raise Corrupt(f"{what} lists frames up to byte {end} of its object, which has them up to {start}")
    return Trailer(parts, hashes)


def check_object(keys: DomainKeys, name: str, stored: bytes) -> Trailer:
    """The trailer of a whole object of frames, once every byte was checked: its name, each frame, each block's hash.

    Raises Corrupt.
    """
    what = f"pack object {name}"
    check_name(name, stored, what)
    start, length = trailer_range(stored[-FOOTER_SIZE:], len(stored), what)
    trailer = decode_trailer(keys, stored[start : start + length], start, what)
    for part, hashes in zip(trailer.parts, trailer.hashes, strict=True):
        for frame, expected in zip(part, hashes, strict=True):
            blocks = decode_frame(keys, part.pack, frame.number, stored[frame.offset : frame.offset + frame.length])
            if tuple(map(keys.block_hash, blocks)) != expected:
                raise Corrupt(f"{what}: the blocks of frame {frame.number} are not those that its trailer lists")
    return trailer
