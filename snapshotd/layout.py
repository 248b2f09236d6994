"""The keys of objects in the object store. Source: docs/format.md, "Objects"."""

from typing import Final, NamedTuple

from blockstore.domain import check_id
from blockstore.errors import InvalidRequest

PACKS: Final = "packs/"
INDEXES: Final = "index/"
SHARDS: Final = "shards/"
SNAPSHOTS: Final = "snapshots/"
QUARANTINES: Final = "quarantine/"
_NAME_LENGTH: Final = 64
_HEX: Final = frozenset("0123456789abcdef")


class RootName(NamedTuple):
    """What the key of a root says. name: the SHA-256 of the object in hexadecimal, empty where the key has none."""

    snapshot: str
    name: str

    @property
    def key(self) -> str:
        return f"{SNAPSHOTS}{self.snapshot}.{self.name}" if self.name else SNAPSHOTS + self.snapshot

    @property
    def digest(self) -> bytes | None:
        """The SHA-256 that the object must have, None where its key does not say."""
        return bytes.fromhex(self.name) if self.name else None


def pack_key(name: str) -> str:
    """Of an object of frames; name: its SHA-256 in hexadecimal. 256 folders keep directories short."""
    return f"{PACKS}{name[:2]}/{name}"


def index_key(name: str) -> str:
    return INDEXES + name


def shard_key(name: str) -> str:
    return SHARDS + name


def root_key(snapshot: str, digest: bytes) -> str:
    """Of the root of that snapshot with that SHA-256. Raises InvalidRequest where that is no id."""
    return RootName(check_id("snap", snapshot), digest.hex()).key


def root_name(key: str) -> RootName | None:
    """What a key says, None where it is not that of a root."""
    snapshot, dot, name = key.removeprefix(SNAPSHOTS).partition(".")
    try:
        found = RootName(check_id("snap", snapshot), name)
    except InvalidRequest:
        return None
    return found if key == found.key and (is_name(name) or not dot) else None


def quarantine_key(number: int) -> str:
    return f"{QUARANTINES}{number}"


def quarantine_number(key: str) -> int | None:
    """The number of a quarantine (64 bits), None where its key is not that of one."""
    name = key.removeprefix(QUARANTINES)
    number = int(name) if name.isascii() and name.isdecimal() else None
    return number if number is not None and number >> 64 == 0 and key == quarantine_key(number) else None


def name_of_key(key: str) -> str:
    """The last part of a key: the object's name."""
    return key.rpartition("/")[2]


def is_name(text: str) -> bool:
    """Whether `text` can be the name of an object that is named by its content."""
    return len(text) == _NAME_LENGTH and _HEX.issuperset(text)
