"""An object store in a directory: the embedded default.

A key is a path below the directory. An object is written under a temporary name, synced, given its own name in
one step (a link where it must not be there yet, else a rename), and then the directory is synced: so it appears
whole or not at all, and stays once `put` has returned. Each directory on the way is synced in the one above it
before its first use; none is ever removed, so none can vanish under a writer.

Temporary files lie in `.incoming`, which no key can name. Their writers hold a lock on them while they live: one
without is left from a crash, and goes when a store is opened. This takes a file system with hard links and flock
(ext4, xfs, btrfs, zfs, NFS 4). While `.incoming` itself is missing (the disk is not mounted), the store does not
answer: an empty directory must never pass for a store that has lost all its objects.
"""

import asyncio
import errno
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from blockstore.durable_files import sync_path
from blockstore.errors import CairnError, Corrupt, InvalidRequest, NoSpace, NotFound, QuorumUnavailable
from snapshotd.background import background_threads
from snapshotd.object_store import (
    MAX_OBJECT_BYTES,
    Buffer,
    Data,
    ObjectInfo,
    buffers_of,
    check_folder,
    check_key,
    check_range,
)

_INCOMING: Final = ".incoming"
#: Disks gain from a few requests at once, and not from more; each takes a thread while it waits for one.
_THREADS: Final = 8
#: Entries that one step of a listing reads: a step holds a thread.
_LISTED_AT_ONCE: Final = 1000
#: Bytes that are written before they are synced: a node's journal on the same disk waits behind no more.
_SYNC_EVERY: Final = 1 << 20
T = TypeVar("T")


class LocalStore:
    """Objects in files below `root`, which is made where it is not there. Blocking; call it before serving."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.url = f"file://{self._root}"
        self.conditional_put = True
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")
        self._writers = background_threads(_THREADS, "store-put")
        self._incoming = self._root / _INCOMING
        self._durable = {self._root}
        self._is_open = False
        with self._told("make", "the store"):
            _make_directories(self._root)
            self._make_durable(self._incoming)
            _remove_left_over(self._incoming)
        self._is_open = True

    async def get(self, key: str) -> bytes:
        return await self._run(lambda: self._read(check_key(key), 0, None))

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        return await self._run(lambda: self._read(check_key(key), start, length))

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        return await self._run(lambda: self._write(check_key(key), data, if_absent), self._writers)

    async def delete(self, key: str) -> None:
        await self._run(lambda: self._remove(check_key(key)))

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        entries = _walk(self._root, check_folder(prefix), after)
        while found := await self._run(lambda: self._next_of(entries, prefix)):
            for info in found:
                yield info

    async def close(self) -> None:
        await asyncio.to_thread(self._writers.shutdown)
        await asyncio.to_thread(self._threads.shutdown)

    async def _run(self, call: Callable[[], T], threads: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads or self._threads, call)

    def _read(self, key: str, start: int, length: int | None) -> bytes:
        with self._told("read", key), open(self._root / key, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if length is None:
                length = size
            if start + length > size or length > MAX_OBJECT_BYTES:
                raise Corrupt(f"{key} in {self.url} has {size} bytes: {length} from {start} cannot be read")
            return _read_exactly(file.fileno(), start, length)

    def _write(self, key: str, data: Data, if_absent: bool) -> bool:
        path = self._root / key
        with self._told("write", key):
            with _temporary_file(self._incoming) as (descriptor, temporary):
                _write_all(descriptor, buffers_of(data))
                os.fsync(descriptor)
                try:
                    self._make_durable(path.parent)
                    is_ours = _give_name(temporary, path, if_absent)
                except FileNotFoundError as error:
                    self._durable = {self._root}
                    raise QuorumUnavailable(f"somebody removed {path.parent}: it is made again") from error
            # Also for one that was there: its writer may not have come so far, and the caller relies on it.
            sync_path(path.parent)
            return is_ours

    def _remove(self, key: str) -> None:
        path = self._root / key
        with self._told("delete", key):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                os.stat(self._incoming)
                return
            sync_path(path.parent)

    def _next_of(self, entries: Iterator[ObjectInfo], prefix: str) -> Sequence[ObjectInfo]:
        with self._told("list", prefix):
            found = [*islice(entries, _LISTED_AT_ONCE)]
            os.stat(self._incoming)
            return found

    def _make_durable(self, directory: Path) -> None:
        """Make `directory` where it is missing; sync it and those above it, as whoever made them may not have done."""
        if directory not in self._durable:
            self._make_durable(directory.parent)
            directory.mkdir(exist_ok=True)
            sync_path(directory.parent)
            self._durable.add(directory)

    @contextmanager
    def _told(self, doing: str, key: str) -> Iterator[None]:
        """What the system says, in the words of Cairn."""
        try:
            yield
        except OSError as error:
            if self._is_open and not self._incoming.exists():
                raise QuorumUnavailable(f"the store {self.url} is not there: is its disk mounted?") from error
            raise _translated(error, f"cannot {doing} {key} in {self.url}: {error.strerror}") from error


def _translated(error: OSError, text: str) -> CairnError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR:
            return NotFound(text)
        case errno.ENOSPC | errno.EDQUOT:
            return NoSpace(f"{text}: make room, or use a larger disk")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return InvalidRequest(f"{text}: give this user the right to write there")
        case errno.EIO:
            return Corrupt(f"{text}: the disk fails")
    return QuorumUnavailable(text)


def _read_exactly(descriptor: int, start: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.pread(descriptor, length, start)
        if not part:
            raise OSError(errno.EIO, "it became shorter while it was read")
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write_all(descriptor: int, buffers: Iterable[Buffer]) -> None:
    unsynced = 0
    for buffer in buffers:
        left = memoryview(buffer).cast("B")
        unsynced += len(left)
        while left:
            left = left[os.write(descriptor, left) :]
        if unsynced >= _SYNC_EVERY:
            os.fdatasync(descriptor)
            unsynced = 0


@contextmanager
def _temporary_file(directory: Path) -> Iterator[tuple[int, Path]]:
    """A new file, open and locked; it goes at the end, unless it was given another name."""
    while True:
        path = directory / secrets.token_hex(16)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.fstat(descriptor).st_nlink:
                continue  # who opened the store just then took it for a left-over
            yield descriptor, path
            return
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _give_name(temporary: Path, path: Path, if_absent: bool) -> bool:
    if not if_absent:
        os.replace(temporary, path)
        return True
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    return True


def _remove_left_over(directory: Path) -> None:
    """Remove the files of writers that died."""
    for path in directory.iterdir():
        with suppress(FileNotFoundError), open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink()


def _make_directories(path: Path) -> None:
    """Make `path` and what is missing above it, durably."""
    if not path.is_dir():
        _make_directories(path.parent)
        path.mkdir(exist_ok=True)
        sync_path(path.parent)


def _walk(root: Path, folder: str, after: str) -> Iterator[ObjectInfo]:
    """The objects in `folder` ("" or with a "/" at the end) and below, ascending by key, from behind `after`.

    A folder counts as its name with "/", which gives the order of whole keys: "a-b/c" before "a/b".
    """
    try:
        with os.scandir(root / folder) as entries:
            found = {entry.name + "/" * entry.is_dir(): entry for entry in entries if not entry.name.startswith(".")}
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in sorted(found):
        key = folder + name
        if name.endswith("/"):
            if key > after or after.startswith(key):
                yield from _walk(root, key, after)
        elif key > after:
            with suppress(FileNotFoundError):  # deleted just now
                yield ObjectInfo(key, found[name].stat().st_size)
