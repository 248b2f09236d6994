"""The narrow interface to object storage: what a directory, S3 and a test's memory all do alike.

An object is bytes under a key; it appears whole or not at all, and is durable when `put` returns. Nothing
more is asked of a store: no rename, no append, no times, no tags. Keys are written in so few characters that
every store can hold them as they are, so no store escapes anything.

Invariants of every implementation (tests/test_object_store.py runs one suite over all):
- A reader sees an object as it was put, or NotFound; never a part of it, never a mix of two puts.
- A listing names every object that was there throughout, in ascending order of keys, each once.
- `put` with if_absent never changes an object that is there. Where `conditional_put` is true, of several such
  puts at once exactly one is told True; elsewhere more than one may be.
- Errors: NotFound, Corrupt, InvalidRequest (refused, and trying again would not help), NoSpace, and
  QuorumUnavailable (no answer, or one that says to try later), which snapshotd.retrying tries again.
"""

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from blockstore.errors import InvalidRequest
from blockstore.units import MIB

Buffer = bytes | bytearray | memoryview
#: What `put` takes: one buffer, or several that are stored one after the other.
Data = Buffer | Sequence[Buffer]

#: More than any object that is written (packs have about 16 MiB, the largest root 16 MiB): what claims to be larger
#: is not ours, and is not read into memory.
MAX_OBJECT_BYTES: Final = 256 * MIB
#: Where `snapshotd.stores.open_store` tries what a store can do; what is left there by a crash is nobody's.
PROBE_FOLDER: Final = "probe/"
#: S3 allows 1,024 bytes with the prefix, file systems 255 in each part.
MAX_KEY_LENGTH: Final = 512
_PART: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_KEY: Final = re.compile(rf"{_PART}(/{_PART})*")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One line of a listing; size in bytes."""

    key: str
    size: int


class ObjectStore(Protocol):
    """A place that keeps objects."""

    @property
    def url(self) -> str:
        """Where it is, for people; it holds no secret."""
        ...

    @property
    def conditional_put(self) -> bool:
        """Whether `if_absent` has one winner. Correctness never rests on it alone."""
        ...

    async def get(self, key: str) -> bytes:
        """The object's bytes. Raises NotFound; Corrupt where it is larger than MAX_OBJECT_BYTES."""
        ...

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes (1 or more) from byte `start`. Raises NotFound; Corrupt where it ends before that."""
        ...

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        """Store an object, durably. if_absent: leave one that is there as it is, and return False.

        The data must not change while this runs, nor after it failed or was cancelled: a write may still be under
        way. Raises NoSpace.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove an object, durably; one that is not there is fine."""
        ...

    def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """All objects below the folder `prefix` ("packs/", or "packs"; "" for all), ascending by key.

        after: only keys greater than this one.
        """
        ...

    async def close(self) -> None:
        """Let go of threads and connections; what runs is waited for. Nothing may be called after it."""
        ...


def check_key(key: str) -> str:
    """`key`, if it is one: parts of letters, digits, "_", "-" and ".", with "/" between. Raises InvalidRequest."""
    if len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise InvalidRequest(f"{key[:80]!r} is no key of an object: parts of A-Z a-z 0-9 _ - . with / between them")
    return key


def check_folder(prefix: str) -> str:
    """The prefix of all keys in the folder `prefix`: with a "/" at the end, or "". Raises InvalidRequest."""
    return check_key(prefix.removesuffix("/")) + "/" if prefix else ""


def check_range(start: int, length: int) -> None:
    """Raises ValueError for a range that a correct caller does not ask for."""
    if start < 0 or not 0 < length <= MAX_OBJECT_BYTES:
        raise ValueError(f"{length} bytes from {start} are no range of an object")


def buffers_of(data: Data) -> Sequence[Buffer]:
    """The buffers that make up `data`."""
    return (data,) if isinstance(data, bytes | bytearray | memoryview) else data


def joined(data: Data) -> bytes:
    """`data` as one bytes object; itself where it is that already."""
    return data if isinstance(data, bytes) else b"".join(buffers_of(data))


def size_of(data: Data) -> int:
    """The bytes in `data`."""
    return sum(memoryview(buffer).nbytes for buffer in buffers_of(data))
