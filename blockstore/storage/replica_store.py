"""One replica's content: committed records in memory over the tables on disk.

commit() and read() run on the event loop and never wait for a disk write; checkpoint() runs in a
thread. A checkpoint freezes what is committed up to its image, applies it in one transaction
together with the image, and only then lets go of the memory: a read at any moment finds each block
there or in the tables. A checkpoint that fails puts the frozen records back, so nothing that was
committed is lost while the process lives; the journal keeps it beyond that. Tables are only ever
changed by whole transactions (docs/storage.md).

What is asked of the tables beside reads and checkpoints has a class for each purpose: `sealed`
generations, `status` of blocks, `scrub`, `repairs`.
"""

import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from blockstore.domain import Position, ReplicaAddress
from blockstore.durable_files import sync_path
from blockstore.errors import Conflict, Corrupt, NoSpace, NotFound
from blockstore.log import LogImage
from blockstore.record import Record, block_checksum
from blockstore.storage.apply import Applier
from blockstore.storage.compaction import compact, remove_leftovers
from blockstore.storage.copies import decode_extent, decode_meta, encode_extent, encode_meta
from blockstore.storage.delta import CopyWriter, extents_above, held_extents, lowest_stated, read_extent, read_meta
from blockstore.storage.digest import digest_of
from blockstore.storage.memtable import Entry
from blockstore.storage.merge import merge
from blockstore.storage.meta import Meta
from blockstore.storage.reads import ZERO_BLOCK, BlockVersion, CorruptBlocks, TableReader, check_range
from blockstore.storage.repair import Repairs
from blockstore.storage.scrub import ScrubReader
from blockstore.storage.sealed import SealedReader
from blockstore.storage.status import StatusReader
from blockstore.storage.tables import FILE_NAME, MakeRoom, Reading, Tables, Writing, closed_on_error, replacement_of
from blockstore.storage.unapplied import Unapplied
from blockstore.units import (
    BLOCK_SIZE,
    FILL_GENERATION,
    BlockNumber,
    Generation,
    Sequence,
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a replica's tables take. user_bytes: of the versions that hold data, all generations together."""

    user_bytes: int
    file_bytes: int
    free_page_bytes: int


def _no_room() -> bool:
    return False


class ReplicaStore:
    """Make it with `create` or `open`."""

    def __init__(self, directory: Path, tables: Tables) -> None:
        self.directory = directory
        self._tables = tables
        self.scrub = ScrubReader(tables)
        self.repairs = Repairs(tables)
        self.sealed = SealedReader(tables)
        self._checkpointing = threading.Lock()
        self._upkeep = threading.Lock()
        self._copies = 0
        self._closing = False
        self.short = False
        """The last change of the tables found no room, and nothing was changed since."""
        self.damage = ""
        """What is wrong with the tables that no other block in its place mends; empty once they were made anew."""
        with closed_on_error(tables), tables.reading() as transaction:
            meta = Meta(tables, transaction)
            meta.check_format()
            self.address: ReplicaAddress = meta.address()
            self.image: LogImage = meta.image()
            self.mark: int = meta.mark()
            self.origin: bytes = meta.origin
            self._unapplied = Unapplied(meta.source)
        self.status = StatusReader(tables, self._unapplied)

    @classmethod
    def create(
        cls,
        directory: Path,
        address: ReplicaAddress,
        image: LogImage,
        *,
        mark: int = 0,
        source: bytes = b"",
        make_room: MakeRoom = _no_room,
    ) -> "ReplicaStore":
        """New tables in `directory`, which is made; durable, but for the directory's own name.

        source: what absent blocks come from, empty for none. make_room: called when the disk is
        full, says whether it freed something. Raises NoSpace.
        """
        directory.mkdir(parents=True, exist_ok=True)

        def describe(meta: Meta) -> None:
            meta.create(address, source)
            meta.put_image(image, mark)

        tables = _empty_tables(directory / FILE_NAME, make_room, describe)
        with closed_on_error(tables):
            sync_path(directory)
        return cls(directory, tables)

    @classmethod
    def open(cls, directory: Path, *, make_room: MakeRoom = _no_room) -> "ReplicaStore":
        """The tables in `directory`. Raises NotFound, Corrupt."""
        path = directory / FILE_NAME
        if not path.exists():
            raise NotFound(f"{directory} holds no tables")
        remove_leftovers(path)
        return cls(directory, Tables(path, create=False, make_room=make_room))

    # ---- committed records

    def commit(self, records: Seq[Record]) -> None:
        """The next committed records, in order: reads see them from now on. O(blocks)."""
        self._unapplied.add(records)

    def reset(self) -> None:
        """Forget committed records that no checkpoint has applied; none may be under way."""
        with self._checkpointing:
            self._unapplied.forget()

    @property
    def unapplied_bytes(self) -> int:
        """Memory that records hold until a checkpoint has applied them."""
        return self._unapplied.size_bytes

    @property
    def unapplied_weight_bytes(self) -> int:
        """How much a checkpoint is due for: small writes count less than they take."""
        return self._unapplied.weight_bytes

    @property
    def has_source(self) -> bool:
        """Whether absent blocks are the source's, as of all that is committed."""
        return self._unapplied.has_source

    @property
    def applied(self) -> Position:
        """The position that the tables reflect."""
        return self.image.applied

    # ---- reads

    def read(self, start: int, count: int) -> bytes:
        """The newest content of `count` blocks, count * BLOCK_SIZE bytes. Raises OutOfRange, CorruptBlocks."""
        return self._read(start, count)[0]

    def read_with_absent(self, start: int, count: int) -> tuple[bytes, list[tuple[int, int]]]:
        """As read; and the runs of blocks, (first, count) in order, that have no entry at all here.

        With a source, the content of those is the source's; without one, zeroes.
        """
        content, reader = self._read(start, count)
        return content, [(first, last - first) for first, last in reader.gaps]

    def _read(self, start: int, count: int) -> tuple[bytes, TableReader]:
        check_range(start, count)
        end = start + count
        in_memory = self._unapplied.overlay(start, end)
        with self._tables.reading() as transaction:
            reader = TableReader(self._tables, transaction)
            pieces: list[bytes | memoryview] = []
            at = start
            for number in sorted(in_memory):
                if at < number:
                    pieces += reader.read(at, number)
                pieces.append(self._over_tables(transaction, reader, number, *in_memory[number]))
                at = number + 1
            if at < end:
                pieces += reader.read(at, end)
            reader.raise_damage()
            return pieces[0] if count == 1 and isinstance(pieces[0], bytes) else b"".join(pieces), reader

    def _over_tables(
        self, transaction: Reading, reader: TableReader, number: int, generation: Generation, entry: Entry
    ) -> bytes | memoryview:
        """A block out of memory; but a fill lies below whatever the guest wrote to the tables."""
        if generation == FILL_GENERATION:
            below = TableReader(self._tables, transaction)  # a gap there is none of the read's
            guests = [found for found in below.versions(number, number + 1) if found.generation > FILL_GENERATION]
            reader.damaged += below.damaged
            if guests:
                return guests[0].block or ZERO_BLOCK
        if entry.block is None:
            return ZERO_BLOCK
        if block_checksum(entry.block, number, generation, entry.sequence) != entry.checksum:
            reader.damaged.append(BlockVersion(BlockNumber(number), generation, Sequence(entry.sequence)))
        return entry.block

    # ---- checkpoint

    def checkpoint(self, image: LogImage, mark: int) -> None:
        """Apply what is committed up to image.applied, and keep the image and the journal mark with it.

        Blocking; commit and read go on in other threads meanwhile. Raises NoSpace (nothing changed,
        to be tried again), Corrupt, StorageFailed (the process must stop).
        """
        with self._checkpointing:
            self._change(image, mark, lambda transaction: None)

    def _change(self, image: LogImage, mark: int, then: Callable[[Writing], None]) -> None:
        """One transaction: the records up to image.applied, then `then`, then the image."""
        frozen = self._unapplied.freeze(image.applied.sequence)
        # A copied meta may know a later generation than the replica's own log does.
        image = replace(image, generation=max(image.generation, self.image.generation))

        def apply(transaction: Writing) -> bytes:
            Applier(self._tables, transaction).apply(frozen, filling=image.filling is not None)
            then(transaction)
            meta = Meta(self._tables, transaction)
            meta.put_image(image, mark)
            if image.filling is None:
                meta.forget_filling()
            return meta.source

        try:
            source = self._tables.change(apply)
        except BaseException as error:
            self.short = isinstance(error, NoSpace)
            if isinstance(error, Corrupt):
                self.note_damage(error)
            self._unapplied.thaw()
            raise
        self.short = False
        if self.image.filling is not None and image.filling is None:
            self.damage = ""  # everything was copied over it
        self.image, self.mark = image, mark
        self._unapplied.applied(source)

    def keep_log(self, image: LogImage, mark: int) -> None:
        """Keep the log behind what is applied in the tables, which can apply nothing more: the journal may forget it.

        Blocking. Raises as checkpoint does.
        """
        with self._checkpointing:
            self._tables.change(lambda transaction: Meta(self._tables, transaction).put_image(image, mark))
            self.image, self.mark = image, mark

    def note_damage(self, error: Corrupt) -> None:
        """The tables are damaged: a copy of everything begins with empty ones. Bad blocks alone are none of that."""
        if not isinstance(error, CorruptBlocks) or self.image.filling is not None:
            self.damage = str(error)

    # ---- copying

    def delta_meta(self) -> bytes:
        """What a copy starts with: generations, pins, source, as of the applied position."""
        with self._tables.reading() as transaction:
            return encode_meta(read_meta(self._tables, transaction))

    def delta_extents(self, since: Sequence) -> list[int]:
        """The extents whose highest sequence, in any generation, is above `since`. Blocking."""
        return extents_above(self._tables, since)

    def held_extents(self) -> set[int]:
        """The extents of which the tables hold anything at all. Blocking. Raises Corrupt."""
        try:
            return held_extents(self._tables)
        except Corrupt as error:
            self.note_damage(error)
            raise

    def copy_extent(self, extent: int) -> list[bytes]:
        """All that the tables hold of an extent, in parts of at most copies.MAX_PART bytes.

        One transaction; the parts name the applied position that it was read at (copied_position).
        Raises CorruptBlocks: what is damaged here is not copied.
        """
        with self._tables.reading() as transaction:
            copy = read_extent(self._tables, transaction, extent)
        return encode_extent(copy)

    def write_copy(self, meta: bytes | None, extents: Seq[Seq[bytes]], stated: Position, image: LogImage) -> None:
        """Lay copies under what this replica has, and apply what is committed up to image.applied.

        stated: the position that the copies are of (none of them may be of a later one). image: with
        filling, and copied at or above stated. One transaction; blocking. Afterwards `image` has the
        peer's generation if that is later. Damaged tables are given up when a copy of everything begins.
        Raises Corrupt, before anything has changed, where what came is damaged; NoSpace, StorageFailed,
        Corrupt as checkpoint does.
        """
        copied_meta = None if meta is None else decode_meta(meta)
        copied = [decode_extent(parts) for parts in extents]
        lowest = lowest_stated(copied_meta, copied, stated.sequence)
        filling = image.filling
        if filling is None:
            raise Conflict(f"replica {self.address.replica} is whole: nothing may be copied over it")

        def write(transaction: Writing) -> None:
            writer = CopyWriter(self._tables, transaction, lowest)
            if copied_meta is not None:
                writer.write_meta(copied_meta)
            for copy in copied:
                writer.write_extent(copy)

        self._copies += 1
        if copied_meta is not None:
            image = replace(image, generation=max(image.generation, copied_meta.generation))
            if self.damage and not filling.since and stated.sequence >= image.applied.sequence:
                self._begin_anew(image)
        with self._checkpointing:
            self._change(image, self.mark, write)

    def _begin_anew(self, image: LogImage) -> None:
        """Empty tables in the place of damaged ones: the peer has all that those held, and copies it."""

        def describe(meta: Meta) -> None:
            meta.create(self.address, self.origin)
            if not self._unapplied.source:
                meta.delete(b"source")
            meta.put_image(image, self.mark)

        with self._upkeep, self._checkpointing:
            path = replacement_of(self._tables.path)
            with closing(_empty_tables(path, self._tables.make_room, describe)) as fresh:
                self._tables.replace_by(fresh)
            remove_leftovers(self._tables.path)
            self.damage = ""

    def digest(self, generation: Generation | None = None) -> str:
        """xxh3-128 over what a generation shows (None: the current one) in the applied state.

        Block number and content, zeroes left out: equal where two replicas show the same, whatever
        their tables look like. Raises NotFound, CorruptBlocks. Blocking, one transaction an extent.
        """
        return digest_of(self._tables, generation)

    # ---- upkeep

    def merge(self) -> bool:
        """Delete the versions that no pinned generation can see; whether there were any. Blocking.

        Checkpoints come in between. A filling replica leaves it for later. Raises NoSpace, Corrupt.
        """
        with self._upkeep:
            return merge(self._tables, lambda: self._closing)

    def compact(self) -> bool:
        """Give the tables' free pages back to the file system; False where it was not to be done now.

        Blocking; everything but merges goes on meanwhile. Raises NoSpace: it needs room for a second copy.
        """
        with self._upkeep:
            copies = self._copies
            self.repairs.mended.clear()
            if self._closing or self.image.filling is not None:
                return False
            return compact(self._tables, lambda: self.repairs.mended, lambda: self._closing or self._copies != copies)

    def file_bytes(self) -> int:
        """What the tables take on disk."""
        return self._tables.file_bytes

    def has_room(self, reserve_bytes: int) -> bool:
        """Whether writes may go on here although the disk is full: into the tables' own free pages.

        They must take twice what is unapplied, because an overwritten page is free only after the next
        checkpoint but one, and reserve_bytes beside. Not after a checkpoint that found no room.
        """
        return not self.short and self._tables.free_page_bytes() >= 2 * self.unapplied_bytes + reserve_bytes

    def usage(self) -> Usage:
        """What is in use of it."""
        with self._tables.reading() as transaction:
            blocks = transaction.stat(self._tables.data)["entries"]
        return Usage(blocks * BLOCK_SIZE, self._tables.file_bytes, self._tables.free_page_bytes())

    def close(self) -> None:
        """Committed records that no checkpoint has applied are forgotten; the journal has them."""
        self._closing = True  # a merge stops at its next transaction, a compaction once its copy is made
        with self._upkeep, self._checkpointing:
            self._tables.close()


def _empty_tables(path: Path, make_room: MakeRoom, describe: Callable[[Meta], None]) -> Tables:
    """New ones; describe: writes who they are of. Raises NoSpace."""
    tables = Tables(path, create=True, make_room=make_room)
    with closed_on_error(tables):
        tables.change(lambda transaction: describe(Meta(tables, transaction)))
    return tables
