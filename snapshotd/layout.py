"""The keys of objects in the object store. Source: docs/format.md, "Objects"."""

from typing import Final

from blockstore.domain import check_id

PACKS: Final = "packs/"
INDEXES: Final = "index/"
SHARDS: Final = "shards/"
SNAPSHOTS: Final = "snapshots/"
QUARANTINES: Final = "quarantine/"


def pack_key(name: str) -> str:
    """Of an object of frames; name: its SHA-256 in hexadecimal. 256 folders keep directories short."""
    return f"{PACKS}{name[:2]}/{name}"


def index_key(name: str) -> str:
    return INDEXES + name


def shard_key(name: str) -> str:
    return SHARDS + name


def root_key(snapshot: str) -> str:
    """Of a snapshot's root. Raises InvalidRequest where that is no id."""
    return SNAPSHOTS + check_id("snap", snapshot)


def quarantine_key(number: int) -> str:
    return f"{QUARANTINES}{number}"


def name_of_key(key: str) -> str:
    """The last part of a key: the object's name."""
    return key.rpartition("/")[2]
