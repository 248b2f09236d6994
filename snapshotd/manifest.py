"""The manifest of a snapshot, by shards: where each block of 128 MiB of the volume is.

A block is named by pack, frame and slot. `frame * 64 + slot` is its *position* in the pack, and blocks that were
written one after the other have positions one after the other, across frames too: so a shard is stored as runs, and
an image that was shipped in one go costs a run for each pack. A shard is whole, or a patch on another
one (by name, so by hash) that sets and removes blocks; a chain has at most 8 patches on a whole one, and each says
how many are below it. Which part of which volume a shard is does not matter to it: snapshots share them.

In memory a shard is one number a block (256 KiB), whatever it maps. Source: docs/format.md, "Shards".
"""

import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from blockstore.errors import Corrupt
from snapshotd import bitmap
from snapshotd.compression import compress, expand
from snapshotd.crypto import NAME_SIZE, SALT_SIZE, DomainKeys, Kind, check_name, name_of, raw_name
from snapshotd.fields import Fields, column
from snapshotd.frame import FRAME_BLOCKS
from snapshotd.index import MAX_FRAME_NUMBER

SHARD_BLOCKS: Final = 32_768
MAX_DEPTH: Final = 8
MAX_SHARD_CONTENT: Final = 1 << 20
_MAX_POSITION: Final = MAX_FRAME_NUMBER * FRAME_BLOCKS
_UNMAPPED: Final = 0
_REMOVED: Final = 0
_PACK_SHIFT: Final = 32
_POSITION_MASK: Final = (1 << 32) - 1


class BlockRef(NamedTuple):
    """Where a block's content is: pack id (16 bytes), frame number in the pack, slot in the frame (0 to 63)."""

    pack: bytes
    frame: int
    slot: int


class FramePart(NamedTuple):
    """`length` blocks from block `start` of the shard on: slots `slot` to `slot + length - 1` of that frame."""

    start: int
    length: int
    pack: bytes
    frame: int
    slot: int


class _Run(NamedTuple):
    """`length` blocks from block `start` of the shard on; pack: 1 + its place in the table of packs, 0 for removed."""

    start: int
    length: int
    pack: int
    position: int


class Shard:
    """What 32,768 blocks map to. Mutable, by its one owner; `copy` for another."""

    __slots__ = ("_cells", "_numbers", "_packs")

    def __init__(self) -> None:
        self._packs: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        #: Of each block 0, or 1 + its pack's number << 32 | position.
        self._cells = array("Q", bytes(8 * SHARD_BLOCKS))

    def __getitem__(self, block: int) -> BlockRef | None:
        """Of block 0 to 32,767 of the shard; None where it is not mapped, and reads as zeroes."""
        return self._ref(self._cells[_within(block)])

    def refs(self, start: int, count: int) -> list[BlockRef | None]:
        """Of `count` blocks from block `start` of the shard on."""
        _within(start, count)
        return [self._ref(cell) for cell in self._cells[start : start + count]]

    def parts(self, start: int, count: int) -> list[FramePart]:
        """Where those of `count` blocks from block `start` of the shard on are that are mapped, in order."""
        _within(start, count)
        cells, at, end = self._cells, start, start + count
        found: list[FramePart] = []
        while at < end:
            cell, first = cells[at], at
            at += 1
            if cell == _UNMAPPED:
                continue
            behind = min(end, first + FRAME_BLOCKS - cell % FRAME_BLOCKS)
            while at < behind and cells[at] == cell + at - first:
                at += 1
            found.append(FramePart(first, at - first, *self._named(cell)))
        return found

    def items(self) -> Iterator[tuple[int, BlockRef]]:
        """(block, reference) of each mapped block, in order."""
        for block, cell in enumerate(self._cells):
            ref = self._ref(cell)
            if ref:
                yield block, ref

    def __len__(self) -> int:
        """How many blocks are mapped. To count them takes milliseconds: ask `is not None` whether there is a shard."""
        return SHARD_BLOCKS - self._cells.count(_UNMAPPED)

    def mapped(self) -> bytes:
        """The bitmap of the mapped blocks: 4,096 bytes."""
        return bitmap.from_numbers((block for block, cell in enumerate(self._cells) if cell), SHARD_BLOCKS)

    def frames(self) -> dict[bytes, set[int]]:
        """By pack id, the numbers of the frames that blocks here lie in."""
        found: dict[bytes, set[int]] = {}
        for frame in {cell // FRAME_BLOCKS for cell in self._cells if cell}:
            ref = self._ref(frame * FRAME_BLOCKS)
            assert ref is not None
            found.setdefault(ref.pack, set()).add(ref.frame)
        return found

    def __setitem__(self, block: int, ref: BlockRef) -> None:
        self._cells[_within(block)] = self._number(ref.pack) << _PACK_SHIFT | _position(ref)

    def remove(self, start: int, count: int = 1) -> None:
        """Unmaps `count` blocks from block `start` of the shard on."""
        _within(start, count)
        self._cells[start : start + count] = array("Q", bytes(8 * count))

    def apply(self, changes: Mapping[int, BlockRef | None]) -> None:
        """Sets the blocks of `changes`; removes those that it maps to None."""
        cells, numbers = self._cells, self._numbers
        for block, ref in changes.items():
            if ref is None:
                cells[_within(block)] = _UNMAPPED
            else:
                number = numbers.get(ref.pack) or self._number(ref.pack)
                cells[_within(block)] = number << _PACK_SHIFT | _position(ref)

    def differing(self, changes: Mapping[int, BlockRef | None]) -> dict[int, BlockRef | None]:
        """Those of `changes` that change something."""
        if not self._packs:  # nothing was ever mapped
            return {block: ref for block, ref in changes.items() if ref is not None}
        return {block: ref for block, ref in changes.items() if self[block] != ref}

    def copy(self) -> "Shard":
        other = Shard()
        other._packs, other._numbers, other._cells = self._packs[:], self._numbers.copy(), self._cells[:]
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shard) and self.refs(0, SHARD_BLOCKS) == other.refs(0, SHARD_BLOCKS)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _ref(self, cell: int) -> BlockRef | None:
        return None if cell == _UNMAPPED else self._named(cell)

    def _named(self, cell: int) -> BlockRef:
        position = cell & _POSITION_MASK
        return BlockRef(self._packs[(cell >> _PACK_SHIFT) - 1], position // FRAME_BLOCKS, position % FRAME_BLOCKS)

    def _number(self, pack: bytes) -> int:
        """1 + the pack's place in the table."""
        number = self._numbers.get(pack)
        if number is None:
            self._packs.append(pack)
            number = self._numbers[pack] = len(self._packs)
        return number

    def _set_run(self, run: _Run, packs: Sequence[bytes]) -> None:
        if run.pack == _REMOVED:
            self.remove(run.start, run.length)
            return
        cell = self._number(packs[run.pack - 1]) << _PACK_SHIFT | run.position
        if run.length == 1:
            self._cells[run.start] = cell
        else:
            self._cells[run.start : run.start + run.length] = array("Q", range(cell, cell + run.length))


@dataclass(frozen=True, slots=True)
class ShardObject:
    """One stored shard as it was read: whole (base None, depth 0), or a patch. `build_shard` makes sense of a chain."""

    name: str
    base: str | None
    depth: int
    packs: tuple[bytes, ...]
    runs: tuple[_Run, ...]


def encode_shard(keys: DomainKeys, shard: Shard, salt: bytes) -> tuple[str, bytes]:
    """(name, stored bytes) of a whole shard. salt: 16 random bytes, never used before."""
    cells = ((block, cell) for block, cell in enumerate(shard._cells) if cell)
    return _encode(keys, b"\0", cells, shard._packs, salt)


def encode_patch(
    keys: DomainKeys, base: str, depth: int, changes: Mapping[int, BlockRef | None], salt: bytes
) -> tuple[str, bytes]:
    """(name, stored bytes) of a patch on the shard named `base`.

    depth: 1 on a whole shard, 1 more than the base's on a patch, at most MAX_DEPTH. changes: by block of the shard,
    None for removed. salt: 16 random bytes, never used before.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"a patch of depth {depth}: 1 to {MAX_DEPTH}")
    numbers: dict[bytes, int] = {}
    cells = [(_within(block), _cell(ref, numbers)) for block, ref in sorted(changes.items())]
    return _encode(keys, depth.to_bytes(1, "little") + raw_name(base), cells, [*numbers], salt)


def should_patch(depth: int, changes: int, mapped: int) -> bool:
    """Whether `changes` blocks go into a patch on a base of `depth`, rather than all `mapped` ones into a whole shard.

    A patch is small, but each reader of the shard reads all below it too.
    """
    return depth < MAX_DEPTH and 2 * changes < mapped


def decode_shard(keys: DomainKeys, name: str, stored: bytes) -> ShardObject:
    """The stored shard of that name. Raises Corrupt where the bytes are not it, whole and unchanged."""
    what = f"shard {name}"
    check_name(name, stored, what)
    fields = Fields(expand(keys.open(Kind.SHARD, b"", stored, what), MAX_SHARD_CONTENT, what), what)
    depth = fields.number(1, MAX_DEPTH)
    base = fields.take(NAME_SIZE).hex() if depth else None
    packs = tuple(fields.names(fields.number(2, SHARD_BLOCKS), SALT_SIZE))
    runs = tuple(_decode_runs(fields, len(packs), patch=base is not None))
    fields.end()
    return ShardObject(name, base, depth, packs, runs)


def build_shard(chain: Sequence[ShardObject]) -> Shard:
    """The shard that a chain describes: the whole one first, then each patch on the one before it.

    Raises Corrupt where they do not follow one another.
    """
    shard = Shard()
    below: ShardObject | None = None
    for stored in chain:
        expected = (below.name, below.depth + 1) if below else (None, 0)
        if (stored.base, stored.depth) != expected:
            raise Corrupt(f"shard {stored.name} of depth {stored.depth} is a patch on {stored.base}, not {expected}")
        for run in stored.runs:
            shard._set_run(run, stored.packs)
        below = stored
    return shard


def _within(start: int, count: int = 1) -> int:
    """`start`, if `count` blocks from there on are in the shard."""
    if not 0 <= start <= start + count <= SHARD_BLOCKS:
        raise ValueError(f"blocks {start} to {start + count} are not within a shard")
    return start


def _position(ref: BlockRef) -> int:
    if not (len(ref.pack) == SALT_SIZE and 0 <= ref.frame < MAX_FRAME_NUMBER and 0 <= ref.slot < FRAME_BLOCKS):
        raise ValueError(f"{ref} names no block")
    return ref.frame * FRAME_BLOCKS + ref.slot


def _cell(ref: BlockRef | None, numbers: dict[bytes, int]) -> int:
    """As in `Shard`; a pack that is not in `numbers` is added there."""
    if ref is None:
        return _REMOVED
    return numbers.setdefault(ref.pack, len(numbers) + 1) << _PACK_SHIFT | _position(ref)


def _encode(
    keys: DomainKeys, head: bytes, cells: Iterable[tuple[int, int]], packs: Sequence[bytes], salt: bytes
) -> tuple[str, bytes]:
    starts, lengths, firsts = _gather(cells)
    used, numbers = _only_used([first >> _PACK_SHIFT for first in firsts])
    ends = [0, *map(operator.add, starts, lengths)]
    chunks = [head, len(used).to_bytes(2, "little"), *(packs[number - 1] for number in used)]
    chunks += [len(starts).to_bytes(2, "little"), column([*map(operator.sub, starts, ends)], 2)]
    chunks += [column(lengths, 2), column(numbers, 2), column(_steps(lengths, firsts), 4)]
    stored = keys.seal(Kind.SHARD, b"", compress(b"".join(chunks)), salt)
    return name_of(stored), stored


def _gather(cells: Iterable[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
    """The runs of (block, cell) in order of the blocks: where they start, their lengths, their first cells."""
    starts: list[int] = []
    lengths: list[int] = []
    firsts: list[int] = []
    expected = (-1, 0)
    for at in cells:
        if at == expected:
            lengths[-1] += 1
        else:
            starts.append(at[0])
            lengths.append(1)
            firsts.append(at[1])
        block, cell = at
        expected = (block + 1, cell + 1 if cell else _REMOVED)
    return starts, lengths, firsts


def _only_used(packs: list[int]) -> tuple[list[int], list[int]]:
    """(the packs that runs have, each once, in order; of each run its pack's place there, from 1, or removed)."""
    used = [number for number in dict.fromkeys(packs) if number != _REMOVED]
    places = {number: place for place, number in enumerate(used, 1)} | {_REMOVED: _REMOVED}
    return used, [places[number] for number in packs]


def _steps(lengths: list[int], firsts: list[int]) -> list[int]:
    """Of each run its position less that behind the last run of the same pack (at first 0), modulo 2^32."""
    ends: dict[int, int] = {}
    steps = []
    for length, first in zip(lengths, firsts, strict=True):
        pack = first >> _PACK_SHIFT
        steps.append(first - ends.get(pack, pack << _PACK_SHIFT) & _POSITION_MASK if pack else 0)
        ends[pack] = first + length
    return steps


def _decode_runs(fields: Fields, packs: int, *, patch: bool) -> Iterator[_Run]:
    count = fields.number(2, SHARD_BLOCKS)
    gaps, counts, numbers = fields.column(count, 2), fields.column(count, 2), fields.column(count, 2)
    ends = [0] * (packs + 1)
    start = 0
    for gap, length, pack, step in zip(gaps, counts, numbers, fields.column(count, 4), strict=True):
        start += gap
        if not length or start + length > SHARD_BLOCKS or pack > packs or (not pack and (step or not patch)):
            raise fields.error(f"has a run of {length} blocks from block {start} on in pack {pack} of {packs}")
        position = (ends[pack] + step) & _POSITION_MASK if pack else 0
        if position + length > _MAX_POSITION:
            raise fields.error(f"has a run at position {position} of a pack, which has {_MAX_POSITION} at most")
        yield _Run(start, length, pack, position)
        ends[pack] = position + length
        start += length
