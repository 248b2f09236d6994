"""What travels when a replica is copied: its meta, and extents with all their generations.

An extent is cut into parts of at most MAX_PART bytes, each decodable by itself; every part names the
extent, its own place among the parts, and the applied position of the peer that all of them were read
at in one transaction. Layout, little-endian:

    header   magic, version, part number, parts in all, extent, position, counts of rows and
             entries, then xxh3-64 over header, rows and entries
    rows     generation, highest sequence, bitmap: as in the table `extents`
    entries  index in the extent, generation, sequence, block checksum, flag: as in `index`
    blocks   of the entries that hold data, in their order

What arrives is checked before it is believed: every bound, the checksum, and each block's own.
"""

import json
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import xxhash

from blockstore.domain import Position
from blockstore.errors import Corrupt
from blockstore.record import block_checksum
from blockstore.storage.keys import BITMAP_SIZE, DATA_FLAG, ZERO_FLAG, ExtentRow, with_check, without_check
from blockstore.storage.meta import Pin, SealedGeneration
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MAX_BLOCKS, MIB, Epoch, Generation, Sequence

MAX_PART: Final = MIB
#: More parts than any extent needs: 256 blocks in 16,000 generations.
MAX_PARTS: Final = 1 << 16
_HEADER: Final = struct.Struct("<4sHxxIIQQQII")
_CHECK: Final = struct.Struct("<Q")
_ROW: Final = struct.Struct(f"<IQ{BITMAP_SIZE}s")
_ENTRY: Final = struct.Struct("<HIQQB")
_MAGIC: Final = b"CExt"
_VERSION: Final = 1
_ROOM: Final = MAX_PART - _HEADER.size - _CHECK.size
_META_KEY: Final = b"cairn meta copy 1"


class CopiedBlock(NamedTuple):
    """One version of a block; block is None for a zero entry."""

    number: int
    generation: Generation
    sequence: Sequence
    checksum: int
    block: bytes | memoryview | None


@dataclass(frozen=True, slots=True)
class ExtentCopy:
    """An extent as a peer's tables had it at `position`."""

    extent: int
    position: Position
    rows: dict[Generation, ExtentRow]
    blocks: list[CopiedBlock]


@dataclass(frozen=True, slots=True)
class MetaCopy:
    """What a peer's tables knew of generations at `position`; generation: that of a write behind it."""

    position: Position
    generation: Generation
    source: bytes
    sealed: list[SealedGeneration]
    pins: list[Pin]


@dataclass(slots=True)
class _Part:
    rows: list[bytes] = field(default_factory=list)
    entries: list[bytes] = field(default_factory=list)
    blocks: list[bytes | memoryview] = field(default_factory=list)
    size: int = 0


def encode_extent(copy: ExtentCopy) -> list[bytes]:
    """The parts of an extent, at least one."""
    parts = [_Part()]
    for generation, row in copy.rows.items():
        packed = _ROW.pack(generation, row.sequence, row.bits.to_bytes(BITMAP_SIZE, "little"))
        _with_room(parts, len(packed)).rows.append(packed)
    for block in copy.blocks:
        size = _ENTRY.size + (BLOCK_SIZE if block.block is not None else 0)
        part = _with_room(parts, size)
        flag = ZERO_FLAG if block.block is None else DATA_FLAG
        index = block.number % EXTENT_BLOCKS
        part.entries.append(_ENTRY.pack(index, block.generation, block.sequence, block.checksum, flag))
        if block.block is not None:
            part.blocks.append(block.block)
    return [_encode_part(copy, part, number, len(parts)) for number, part in enumerate(parts)]


def decode_extent(parts: Seq[bytes]) -> ExtentCopy:
    """The reverse of encode_extent, each block verified. Raises Corrupt."""
    headers = [_decode_header(part) for part in parts]
    whole = [(number, len(parts)) for number in range(len(parts))]
    if not headers or [(h.part, h.parts) for h in headers] != whole:
        raise Corrupt(
            f"an extent's copy comes in parts {[(h.part, h.parts) for h in headers]}, not all or not in order"
        )
    first = headers[0]
    if any((h.extent, h.position) != (first.extent, first.position) for h in headers):
        raise Corrupt(f"the parts of extent {first.extent} are not of one extent and position")
    rows: dict[Generation, ExtentRow] = {}
    blocks: list[CopiedBlock] = []
    for header, part in zip(headers, parts, strict=True):
        _decode_part(header, memoryview(part), rows, blocks)
    keys = {(block.number, block.generation) for block in blocks}
    if len(keys) != len(blocks) or any(b.sequence > first.position.sequence for b in blocks):
        raise Corrupt(f"the copy of extent {first.extent} has an entry twice, or one from after its position")
    return ExtentCopy(first.extent, first.position, rows, blocks)


def copied_position(part: bytes) -> Position:
    """The applied position that a part, or an encoded meta, was stated at. Raises Corrupt."""
    if part[: len(_MAGIC)] == _MAGIC:
        return _decode_header(part).position
    return decode_meta(part).position


def copied_extent(part: bytes) -> int:
    """Which extent a part is of. Raises Corrupt."""
    return _decode_header(part).extent


def encode_absence(extent: int, position: Position) -> bytes:
    """The one part of an extent of which a peer had nothing at `position`."""
    (part,) = encode_extent(ExtentCopy(extent, position, {}, []))
    return part


def encode_meta(copy: MetaCopy) -> bytes:
    """The bytes of `copy`."""
    content = {
        "position": copy.position,
        "generation": copy.generation,
        "source": copy.source.hex(),
        "sealed": [(s.generation, s.sequence, s.argument.hex()) for s in copy.sealed],
        "pins": [(p.generation, p.holder.hex(), p.sequence) for p in copy.pins if p.held],
    }
    return with_check(_META_KEY, json.dumps(content).encode())


def decode_meta(encoded: bytes) -> MetaCopy:
    """The reverse of encode_meta. Raises Corrupt."""
    content = without_check(_META_KEY, encoded)
    try:
        found = json.loads(content)
        epoch, sequence = found["position"]
        return MetaCopy(
            Position(Epoch(epoch), Sequence(sequence)),
            Generation(found["generation"]),
            bytes.fromhex(found["source"]),
            [SealedGeneration(Generation(g), Sequence(s), bytes.fromhex(a)) for g, s, a in found["sealed"]],
            [Pin(Generation(g), bytes.fromhex(h), Sequence(s), held=True) for g, h, s in found["pins"]],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"the copy of a meta table makes no sense: {error}") from error


class _Header(NamedTuple):
    part: int
    parts: int
    extent: int
    position: Position
    rows: int
    entries: int


def _with_room(parts: list[_Part], size: int) -> _Part:
    if parts[-1].size + size > _ROOM:
        parts.append(_Part())
    parts[-1].size += size
    return parts[-1]


def _encode_part(copy: ExtentCopy, part: _Part, number: int, count: int) -> bytes:
    header = _HEADER.pack(
        _MAGIC, _VERSION, number, count, copy.extent, *copy.position, len(part.rows), len(part.entries)
    )
    listed = b"".join([header, *part.rows, *part.entries])
    check = _CHECK.pack(xxhash.xxh3_64_intdigest(listed))
    return b"".join([header, check, *part.rows, *part.entries, *part.blocks])


def _decode_header(part: bytes) -> _Header:
    if not _HEADER.size + _CHECK.size <= len(part) <= MAX_PART:
        raise Corrupt(f"a part of an extent has {len(part)} bytes, at most {MAX_PART} are allowed")
    magic, version, number, count, extent, epoch, sequence, rows, entries = _HEADER.unpack_from(part)
    if magic != _MAGIC or version != _VERSION:
        raise Corrupt(f"not a part of an extent of version {_VERSION}: magic {magic!r}, version {version}")
    if count > MAX_PARTS or extent >= MAX_BLOCKS // EXTENT_BLOCKS:
        raise Corrupt(f"a part claims extent {extent} in {count} parts, beyond the limits")
    listed = _HEADER.size + _CHECK.size + rows * _ROW.size + entries * _ENTRY.size
    if listed > len(part):
        raise Corrupt(f"a part claims {rows} rows and {entries} entries, which do not fit its {len(part)} bytes")
    digest = xxhash.xxh3_64(part[: _HEADER.size])
    digest.update(part[_HEADER.size + _CHECK.size : listed])
    if _CHECK.pack(digest.intdigest()) != part[_HEADER.size : _HEADER.size + _CHECK.size]:
        raise Corrupt(f"a part of extent {extent} fails its checksum")
    return _Header(number, count, extent, Position(Epoch(epoch), Sequence(sequence)), rows, entries)


def _decode_part(
    header: _Header, part: memoryview, rows: dict[Generation, ExtentRow], blocks: list[CopiedBlock]
) -> None:
    at = _HEADER.size + _CHECK.size
    entries_at = at + header.rows * _ROW.size
    for generation, sequence, bits in _ROW.iter_unpack(part[at:entries_at]):
        rows[Generation(generation)] = ExtentRow(Sequence(sequence), int.from_bytes(bits, "little"))
    blocks_at = entries_at + header.entries * _ENTRY.size
    first = header.extent * EXTENT_BLOCKS
    for index, generation, sequence, checksum, flag in _ENTRY.iter_unpack(part[entries_at:blocks_at]):
        block = None
        if flag == DATA_FLAG:
            block = part[blocks_at : blocks_at + BLOCK_SIZE]
            blocks_at += BLOCK_SIZE
        number = first + index
        content = b"" if block is None else block
        if index >= EXTENT_BLOCKS or checksum != block_checksum(content, number, generation, sequence):
            raise Corrupt(f"copied block {number} of generation {generation} fails its checksum")
        blocks.append(CopiedBlock(number, Generation(generation), Sequence(sequence), checksum, block))
    if blocks_at != len(part):
        raise Corrupt(f"a part of extent {header.extent} has {len(part) - blocks_at} bytes behind its blocks")
