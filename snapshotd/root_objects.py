"""Roots in the object store, by their hash or by their snapshot.

A root's key has its hash, so no put ever takes the place of another root: whoever writes one for the same snapshot, as
an earlier attempt did whose end nobody heard of, or another daemon that was given the same task, writes beside it.
Which of them counts is what control says, which keeps the SHA-256 of the one that completed the snapshot and never
takes another; prune removes the others then. It also removes one that is put so late that its snapshot was deleted
meanwhile: control remembers what it deleted. A root of a snapshot that control never had stays, as it may be all that
is left of a lost cluster.

Roots that were stored before keys had hashes are under the snapshot's id alone, and are found there.
Source: docs/format.md, "Roots".
"""

from blockstore.errors import NotFound
from snapshotd.layout import SNAPSHOTS, RootName, root_key, root_name
from snapshotd.object_store import ObjectStore


async def get_root(store: ObjectStore, snapshot: str, digest: bytes) -> tuple[str, bytes]:
    """(key, stored bytes) of the root with that SHA-256, which is not checked here. Raises NotFound, InvalidRequest."""
    key = root_key(snapshot, digest)
    try:
        return key, await store.get(key)
    except NotFound as error:
        early = RootName(snapshot, "").key
        try:
            return early, await store.get(early)
        except NotFound:
            raise error from None


async def roots_of(store: ObjectStore, snapshot: str) -> list[RootName]:
    """All roots of that snapshot that are there; no more is listed of the others than what one request brings."""
    found: list[RootName] = []
    key = SNAPSHOTS + snapshot
    # From behind all ids that differ from this one before their last digit.
    async for info in store.list(SNAPSHOTS, after=key[:-1]):
        name = root_name(info.key)
        if name is not None and name.snapshot == snapshot:
            found.append(name)
        elif info.key > key and not info.key.startswith(key):
            break
    return found
