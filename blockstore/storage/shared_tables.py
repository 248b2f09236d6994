"""The tables of a replica whose node is another process on this machine, for reads beside it.

What HDFS calls a short-circuit read: LMDB lets several processes share an environment, so who leads a volume on the
host of one of its replicas need not ask that node. Nothing is written here but LMDB's own entry in its list of
readers. What makes such a read safe:

- It shows the replica as of its last checkpoint: whoever reads says what the tables must reflect, and is told None
  where they do not. Tables that fill, or have a source behind them, show nothing.
- The fence has the reader's epoch after the read (blockstore.storage.fence).
- The two files of the environment belong together. A compaction puts new tables, then their lock file, in the place of
  the old ones, and between the two they do not; who opens them looks whether one was under way, or came between.
  Tables that were replaced stay as they were, and are left when that is noticed.
- Blocks pass their checksums; what does not is None here, and the node finds it by itself when it is asked.

LMDB trusts its pages, and a bad one may end the process: see nbd_server/crash.py for what follows from that.
"""

import os
import struct
from pathlib import Path

import lmdb

from blockstore.domain import ORIGIN, Position, TablesPlace
from blockstore.errors import CairnError, Corrupt
from blockstore.storage.fence import FenceView
from blockstore.storage.meta import Meta
from blockstore.storage.reads import TableReader, check_range
from blockstore.storage.tables import FILE_NAME, NAMES, Handles, Reading, is_cut_short, lock_of, replacement_of


class SharedTables(Handles):
    """Opened for reads, in one thread. applied: as of the last read."""

    def __init__(self, place: TablesPlace, epoch: int) -> None:
        """Raises CairnError where they cannot be opened (now), or the directory is another one than the node's."""
        directory = Path(place.directory)
        self.path = directory / FILE_NAME
        self.applied = ORIGIN
        self._epoch = epoch
        self._shows = False
        self._looked_at = -1
        try:
            self._fence = FenceView(directory, place.fence)
        except OSError as error:
            raise CairnError(f"{place.directory} cannot be read: {error}") from error
        try:
            self._environment = self._open()
        except BaseException:
            self._fence.close()
            raise

    def _open(self) -> lmdb.Environment:
        try:
            self._files = self._files_now()
            if not os.access(lock_of(self.path), os.R_OK | os.W_OK):
                # LMDB does without it where the file system is read-only: then the node would not see who reads.
                raise CairnError(f"{lock_of(self.path)} cannot be written to")
            if is_cut_short(self.path):
                raise CairnError(f"{self.path} is cut short")
            environment = lmdb.open(
                str(self.path), map_size=0, subdir=False, max_dbs=len(NAMES), create=False, readonly=True,
                max_spare_txns=1,
            )  # fmt: skip
        except (OSError, lmdb.Error) as error:
            raise CairnError(f"{self.path} cannot be opened: {error}") from error
        try:
            # In this order: while one file has its new name and the other one has not, the lock has its old name.
            under_way = lock_of(replacement_of(self.path)).exists()
            if under_way or self._files_now() != self._files:
                raise CairnError(f"{self.path} is being replaced")
            self._take_handles(environment, create=False)
        except (OSError, lmdb.Error) as error:
            environment.close()
            raise CairnError(f"{self.path} cannot be opened: {error}") from error
        except BaseException:
            environment.close()
            raise
        return environment

    def read(self, start: int, count: int, needed: Position) -> bytes | memoryview | None:
        """The newest content of `count` blocks, where the tables reflect `needed` at least.

        None where they do not, or show nothing, or another epoch was sealed: the node knows more. Raises Corrupt
        where something is damaged; OutOfRange; CairnError where they cannot be read, which may be otherwise once they
        are opened anew.
        """
        check_range(start, count)
        transaction = self._begin()
        try:
            if transaction.id() != self._looked_at:
                self._look(transaction)
            if not self._shows or self.applied < needed:
                return None
            reader = TableReader(self, transaction)
            pieces = reader.read(start, start + count)
            reader.raise_damage()
            content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except (lmdb.Error, struct.error) as error:
            raise Corrupt(f"the tables at {self.path} are damaged: {error}") from error
        finally:
            transaction.abort()
        return content if self._fence.shows(self._epoch) else None

    def look(self) -> Position:
        """What they reflect now. Raises as `read` does."""
        transaction = self._begin()
        try:
            self._look(transaction)
        except (lmdb.Error, struct.error) as error:
            raise Corrupt(f"the tables at {self.path} are damaged: {error}") from error
        finally:
            transaction.abort()
        return self.applied

    @property
    def is_current(self) -> bool:
        """Whether the files are still those of the replica."""
        try:
            return self._files_now() == self._files
        except OSError:
            return False

    def close(self) -> None:
        self._environment.close()
        self._fence.close()

    def _begin(self) -> Reading:
        try:
            try:
                return self._environment.begin(buffers=True)
            except lmdb.MapResizedError:
                self._environment.set_mapsize(0)  # the node's
                return self._environment.begin(buffers=True)
        except lmdb.Error as error:
            raise CairnError(f"{self.path} cannot be read: {error}") from error

    def _look(self, transaction: Reading) -> None:
        """What this state of the tables is good for."""
        meta = Meta(self, transaction)
        self._shows = meta.get(b"filling") is None and not meta.source
        self.applied = meta.applied()
        self._looked_at = transaction.id()

    def _files_now(self) -> tuple[int, int]:
        """The inodes of the tables and of their lock file. Raises OSError."""
        return os.stat(self.path).st_ino, os.stat(lock_of(self.path)).st_ino
