"""One LMDB environment: its tables, who may be inside it, and how it grows.

A read transaction lasts one call, and no view of the map leaves this package: LMDB cannot reuse a
page that an open reader may see. The map grows behind a gate that lets readers out first, since
moving the map under a reader is a SIGBUS. One change at a time; a change that finds the map full is
undone, the map grows, and the whole change runs again, so it must compute everything anew.

A transaction writes all its pages before its sync and its meta page after it, so a failed one leaves
the tables as they were, and trying it again on a full disk is safe: all its pages are written again.
Any other failure of a write or sync ends the environment (`StorageFailed`): the process must stop.
LMDB says EIO for both a write that the full disk cut short and a sync that failed. A descriptor of ours
that was open before tells of the failed sync, too; and only a full disk takes no byte behind the file's end.
"""

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import lmdb

from blockstore.durable_files import sync_path
from blockstore.errors import CairnError, Corrupt, NoSpace, NotFound
from blockstore.storage.space import NO_ROOM, disk_free_bytes
from blockstore.units import GIB, MIB

if TYPE_CHECKING:
    Reading = lmdb.Transaction[memoryview]
    Writing = lmdb.Transaction[bytes]
    ReadCursor = lmdb.Cursor[memoryview]
    WriteCursor = lmdb.Cursor[bytes]
else:
    Reading = Writing = lmdb.Transaction
    ReadCursor = WriteCursor = lmdb.Cursor

#: Of the tables in a replica's directory.
FILE_NAME: Final = "tables.mdb"
NAMES: Final = (b"index", b"data", b"extents", b"present", b"tail", b"meta")
PAGE_SIZE: Final = 4096
INITIAL_MAP_BYTES: Final = 64 * MIB
#: The map doubles up to steps of this size: address space is plenty, yet many replicas share it.
MAX_GROWTH_BYTES: Final = 64 * GIB
#: At least so much, or else its own size, may be added to a file while it is copied: more waits for the copy.
COPY_GROWTH_BYTES: Final = GIB
#: Of LMDB's meta page (lmdb 0.9, struct MDB_meta): the last page in use, and the number of its transaction.
_META_AT: Final = 136
_META_END: Final = struct.Struct("<QQ")
#: With less than this free, a write that was cut short was cut by the full disk, whatever was given back since.
_FULL_DISK_BYTES: Final = MIB

T = TypeVar("T")
MakeRoom = Callable[[], bool]
"""Called when the disk is full: whether something was freed, so that another try makes sense."""


class StorageFailed(CairnError):
    """A write or sync of the tables failed: what is on disk is not known, and the process must stop."""


class Gate:
    """Counts those inside; `closed` waits until all are out and keeps others waiting."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    def enter(self) -> None:
        with self._changed:
            while self._shut:
                self._changed.wait()
            self._inside += 1

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            if self._shut and not self._inside:
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nobody is inside; one caller at a time, which must not be inside itself."""
        with self._changed:
            assert not self._shut
            self._shut = True
            while self._inside:
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._shut = False
                self._changed.notify_all()


class Handles:
    """The six tables of an environment, by name, for its transactions."""

    index: "lmdb._Database"
    data: "lmdb._Database"
    extents: "lmdb._Database"
    present: "lmdb._Database"
    tail: "lmdb._Database"
    meta: "lmdb._Database"

    def _take_handles(self, environment: lmdb.Environment, *, create: bool) -> None:
        handles = [environment.open_db(name, create=create) for name in NAMES]
        self.index, self.data, self.extents, self.present, self.tail, self.meta = handles

    def _handles(self) -> tuple["lmdb._Database", ...]:
        return (self.index, self.data, self.extents, self.present, self.tail, self.meta)


class Tables(Handles):
    """The six tables of one replica in the file `path` (and its lock file beside it)."""

    def __init__(self, path: Path, *, create: bool, make_room: MakeRoom = lambda: False) -> None:
        self.path = path
        self.make_room = make_room
        self._gate = Gate()
        self._changing = threading.RLock()
        self._copying = threading.Lock()
        """Held while the file is copied, which is a reader that stays for long: the gate must not be shut then."""
        self._failed: StorageFailed | None = None
        self._open(create)
        self._witness = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        """Its fsync fails, too, after one of LMDB's failed."""

    def _open(self, create: bool) -> None:
        self._open_environment(create)
        with self._environment.begin() as transaction:
            shown = transaction.id()
        if shown != self._environment.info()["last_txnid"]:
            # The lock file is another file's: a process died between the two renames of `replace_by`, and somebody who
            # reads beside the node has kept it from being made anew. An older state would show, and come back.
            self._environment.close()
            lock_of(self.path).unlink()
            self._open_environment(create)

    def _open_environment(self, create: bool) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            # With the kernel's readahead: what is not in memory is read at 270 MiB/s in runs, without it at 37;
            # single blocks take 0.2 ms instead of 0.12.
            self._environment = lmdb.open(
                str(self.path), map_size=_map_size_for(size), subdir=False, max_dbs=len(NAMES), create=create,
                meminit=False, max_spare_txns=4,
            )  # fmt: skip
        except lmdb.Error as error:
            raise self._opening_failed(error) from error
        try:
            self._take_handles(self._environment, create=create)
            # A process that was killed may have left its last meta page in the page cache only.
            self._environment.sync(True)
        except lmdb.Error as error:
            self._environment.close()
            raise self._opening_failed(error) from error

    def _opening_failed(self, error: lmdb.Error) -> CairnError:
        if isinstance(error, lmdb.DiskError):
            return NoSpace(f"no room for the tables at {self.path}; free disk space there")
        if error.code == errno.EIO:
            return self._fail(error)
        return Corrupt(
            f"the tables at {self.path} cannot be opened: {error}; if the file is damaged (`cairn node check`) and "
            "the volume has other whole replicas, move it away and start the node: it is filled anew from them"
        )

    def reading(self) -> "_ReadCall":
        """`with tables.reading() as transaction:`, for one call. Not to be nested."""
        return _ReadCall(self)

    def change(self, apply: Callable[[Writing], T]) -> T:
        """Run `apply` in one durable transaction: all of it or nothing.

        `apply` may run more than once. Raises NoSpace where the disk is full and no room could be
        made (nothing has changed then), StorageFailed where a write failed.
        """
        with self._changing:
            while True:
                self.check_usable()
                try:
                    self._environment.reader_check()  # of who was killed while it read beside the node
                    with self._environment.begin(write=True) as transaction:
                        return apply(transaction)
                except lmdb.MapFullError:
                    self._grow()
                except lmdb.Error as error:
                    self._after_failure(error)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No change runs but the caller's; reads go on."""
        with self._changing:
            yield

    def copy_compacted(self, target: Path) -> None:
        """A copy without free pages in the new file `target`, durable but for its name.

        Changes and reads go on meanwhile. The map cannot grow as long, so it is made roomy before: a change that
        needs more waits. Raises NoSpace, Corrupt, StorageFailed. Not tried where it would fill up the disk, for others
        write to it as well.
        """
        needed, free = self.file_bytes - self.free_page_bytes(), disk_free_bytes(self.path.parent)
        if free < needed:
            raise NoSpace(f"{self.path} cannot be compacted: {free} bytes are free, and the copy takes {needed}")
        with self._changing:
            wanted = self.file_bytes + max(self.file_bytes, COPY_GROWTH_BYTES)
            while self._environment.info()["map_size"] < wanted:
                self._grow()
            self._copying.acquire()
        self._gate.enter()
        try:
            self._environment.copy(str(target), compact=True)
            sync_path(target)
        except (lmdb.Error, OSError) as error:
            if (error.errno if isinstance(error, OSError) else error.code) in NO_ROOM:
                raise NoSpace(f"{self.path} cannot be compacted: {error}; free disk space there") from error
            raise self._failure(error) from error
        finally:
            self._gate.leave()
            self._copying.release()

    def replace_by(self, fresh: "Tables") -> None:
        """Put these tables in this one's place, in one atomic step; `fresh` is closed then. Raises StorageFailed.

        Their lock file follows them: who opens the tables by name shares it with this process (shared_tables).
        The name is durable before anything changes in the new file. Reads wait only while the two are exchanged:
        to unmap the old file and give its blocks back takes 0.4 s where it has 500 MB.
        """
        with self._changing:
            try:
                os.replace(fresh.path, self.path)
                os.replace(lock_of(fresh.path), lock_of(self.path))
                sync_path(self.path.parent)
            except OSError as error:
                raise self._fail(error) from error
            with self._gate.closed():
                self._environment, fresh._environment = fresh._environment, self._environment
                self._witness, fresh._witness = fresh._witness, self._witness
                self.index, self.data, self.extents, self.present, self.tail, self.meta = fresh._handles()
        fresh.close()

    def check_usable(self) -> None:
        """Raises StorageFailed once a write has failed."""
        if self._failed is not None:
            raise self._failed

    @property
    def file_bytes(self) -> int:
        """What the file takes on disk; holes do not count. Raises NotFound once it is deleted."""
        try:
            return os.stat(self.path).st_blocks * 512
        except FileNotFoundError as error:
            raise NotFound(f"{self.path} is not there any more") from error

    def free_page_bytes(self) -> int:
        """Pages of the file that hold nothing, LMDB's own list of them included."""
        with self.reading() as transaction:
            stats = [transaction.stat(handle) for handle in self._handles()]
            stats.append(self._environment.stat())
            used = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats) + 2
            return max(0, self._environment.info()["last_pgno"] + 1 - used) * PAGE_SIZE

    def close(self) -> None:
        """May be called again."""
        with self._changing, self._gate.closed():
            self._environment.close()
            if self._witness >= 0:
                os.close(self._witness)
                self._witness = -1

    def _grow(self) -> None:
        with self._copying, self._gate.closed():
            size = self._environment.info()["map_size"]
            self._environment.set_mapsize(size + min(size, MAX_GROWTH_BYTES))

    def _after_failure(self, error: lmdb.Error) -> None:
        """Returns where the change may be tried again."""
        if error.code in NO_ROOM or (error.code == errno.EIO and self._was_cut_short()):
            if not self.make_room():
                raise NoSpace(f"the disk of {self.path} is full: {error}; free disk space there") from error
            return
        raise self._failure(error) from error

    def _failure(self, error: Exception) -> CairnError:
        """Of anything but too little room."""
        if isinstance(error, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.InvalidError):
            return Corrupt(f"the tables at {self.path} are damaged: {error}")
        return self._fail(error)

    def _fail(self, error: Exception) -> StorageFailed:
        self._failed = StorageFailed(f"writing the tables at {self.path} failed: {error}; the node must start anew")
        return self._failed

    def _was_cut_short(self) -> bool:
        """Whether the failure was that of a write for which there was no room."""
        try:
            os.fsync(self._witness)
        except OSError:
            return False  # it was the sync's
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize < _FULL_DISK_BYTES or not self._takes_a_byte()

    def _takes_a_byte(self) -> bool:
        """Whether there is room behind the file's end."""
        end = os.fstat(self._witness).st_size
        try:
            os.pwrite(self._witness, b"\0", end)
        except OSError as error:
            return error.errno not in NO_ROOM
        os.ftruncate(self._witness, end)
        return True


class _ReadCall:
    """A read transaction behind the gate. Errors of LMDB while it is open are damage, as are keys of a wrong size."""

    __slots__ = ("_tables", "_transaction")

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def __enter__(self) -> Reading:
        tables = self._tables
        tables._gate.enter()
        try:
            self._transaction = tables._environment.begin(buffers=True)
        except lmdb.Error as error:
            tables._gate.leave()
            raise CairnError(f"the tables at {tables.path} cannot be read, or were closed: {error}") from error
        return self._transaction

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._transaction.abort()
        self._tables._gate.leave()
        if isinstance(error, lmdb.Error | struct.error):
            raise Corrupt(f"the tables at {self._tables.path} are damaged: {error}") from error


def lock_of(path: Path) -> Path:
    """LMDB's lock file of the tables at `path`."""
    return path.with_name(path.name + "-lock")


def replacement_of(path: Path) -> Path:
    """Where the file is made that is to take the place of the tables at `path`."""
    return path.with_name(path.name + ".compacted")


def _map_size_for(file_bytes: int) -> int:
    """A map with room to grow: at least twice the file, a power of two up to the largest step."""
    size = INITIAL_MAP_BYTES
    while size < 2 * file_bytes:
        size += min(size, MAX_GROWTH_BYTES)
    return size


@contextmanager
def closed_on_error(tables: Tables) -> Iterator[None]:
    """A process may open an environment only once: one that cannot be used must not stay open."""
    try:
        yield
    except BaseException:
        tables.close()
        raise


def is_cut_short(path: Path) -> bool:
    """Whether a file may lack pages that its tables point to: reading one would end the process by SIGBUS.

    Looked up in the newer one of LMDB's two meta pages. Pages behind the file's end may also be free ones.
    """
    with path.open("rb") as file:
        head = file.read(2 * PAGE_SIZE)
    if len(head) < 2 * PAGE_SIZE:
        return True
    _, last_page = max(tuple(reversed(_META_END.unpack_from(head, at))) for at in (_META_AT, PAGE_SIZE + _META_AT))
    return int(last_page + 1) * PAGE_SIZE > path.stat().st_size
