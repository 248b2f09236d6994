"""Where an exported image goes: a file with holes, or a stream in which zeroes are written out.

A file appears under its name when it is whole and on the disk, and not before: what is written lies beside
it meanwhile, and goes when the export fails.
"""

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from blockstore.errors import AlreadyExists, NotFound
from blockstore.units import MIB

_ZEROES: Final = bytes(MIB)


class ImageOutput(Protocol):
    """Takes data in the order of the offsets; what is left out is zero."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """`data` from `offset` on; not before what was written last."""

    def finish(self, size_bytes: int) -> None:
        """That was all: the image ends at `size_bytes`."""


class HoleFile:
    """A regular file: what is left out stays a hole, and `write` takes data in any order, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written

    def sync(self) -> None:
        """What was written is on the disk then, but for the file's length."""
        os.fdatasync(self._descriptor)

    def finish(self, size_bytes: int) -> None:
        os.ftruncate(self._descriptor, size_bytes)
        os.fsync(self._descriptor)


class Stream:
    """A pipe or a device: every byte is written, one after the other."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._zeroes_up_to(offset)
        self._put(data)

    def finish(self, size_bytes: int) -> None:
        self._zeroes_up_to(size_bytes)
        if stat.S_ISBLK(os.fstat(self._descriptor).st_mode):
            os.fsync(self._descriptor)

    def _zeroes_up_to(self, offset: int) -> None:
        while self._position < offset:
            self._put(_ZEROES[: offset - self._position])

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._position += len(data)


@contextmanager
def open_output(file: str, *, force: bool) -> Iterator[ImageOutput]:
    """The output that `file` names, `-` being stdout; a new file is there when the block has ended well.

    Raises AlreadyExists unless `force`, NotFound where there is no such directory.
    """
    path = Path(file)
    if file == "-":
        yield Stream(sys.stdout.fileno())
    elif path.exists() and not force:
        raise AlreadyExists(f"{path} is there already: --force replaces it")
    elif path.exists() and not path.is_file():  # a device, a named pipe
        descriptor = os.open(path, os.O_WRONLY)
        try:
            yield Stream(descriptor)
        finally:
            os.close(descriptor)
    else:
        with _new_file(path, force=force) as output:
            yield output


@contextmanager
def _new_file(path: Path, *, force: bool) -> Iterator[ImageOutput]:
    if not path.parent.is_dir():
        raise NotFound(f"{path.parent} is no directory: make it first")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        yield HoleFile(descriptor)
        if force:
            partial.replace(path)
        else:
            _link(partial, path)
    finally:
        os.close(descriptor)
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Unlike a rename it replaces nothing that came there meanwhile."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        raise AlreadyExists(f"{path} came to be meanwhile: --force replaces it") from None
