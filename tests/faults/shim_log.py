"""What shim.c wrote down of one process: every change to its files, in order."""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct("<IBBHQQQ")


class Operation(IntEnum):
    """As in shim.c."""

    CREATE = 1
    MKDIR = 2
    RENAME = 3
    LINK = 4
    UNLINK = 5
    WRITE = 6
    ZEROES = 7
    TRUNCATE = 8
    SYNC_BEGIN = 9
    SYNC_END = 10


@dataclass(frozen=True, slots=True)
class Call:
    """names: paths below the root. a, b: offset and length of a write, a size, or the number of a sync."""

    operation: Operation
    durable: bool
    names: tuple[str, ...]
    inode: int
    a: int
    b: int
    data: bytes


def read_log(path: Path) -> Iterator[Call]:
    """All calls that were written down as a whole; the last one may have been cut off by a kill."""
    size = path.stat().st_size
    if not size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        at = 0
        while at + _HEADER.size <= size:
            length, operation, durable, names, inode, a, b = _HEADER.unpack_from(memory, at)
            if at + length > size:
                return
            names_end = at + _HEADER.size + names
            paths = memory[at + _HEADER.size : names_end].decode().split("\0")[:-1]
            yield Call(Operation(operation), bool(durable), tuple(paths), inode, a, b, memory[names_end : at + length])
            at += length
