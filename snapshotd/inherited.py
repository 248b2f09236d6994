"""Whether what a snapshot takes over from its base is still in the object store, by what listings and the index tell.

A completed snapshot is not deleted while another one is shipped as a change of it, and prune keeps what it needs: so
what is missing was removed by hand, or lost. A snapshot that takes over what is gone would be called completed, and
could not be restored. To read the base's whole manifest for each snapshot would cost more than most of them ship, so
these are looked at:

- Its shards, by a listing of their names. Not the shards that those are patches on: only they themselves name these.
- Objects of frames that an index names and the last listing lacks. Mostly there are none, and nothing is read. Where
  there are some, or an index is damaged, the shards tell whether frames of the base are among what is lost.
"""

from collections.abc import Iterable

from blockstore.errors import Corrupt
from snapshotd.layout import SHARDS, name_of_key, shard_key
from snapshotd.pack_index import PackIndex
from snapshotd.references import Frames, Manifests, References, numbers_of, references_of
from snapshotd.repository import Repository
from snapshotd.root import Root


async def check_inherited(repository: Repository, index: PackIndex, base: Root) -> None:
    """After a look at the index and at the objects of frames. Raises Corrupt, which names one that is gone."""
    present = {name_of_key(info.key) async for info in repository.store.list(SHARDS)}
    for name in base.shards.values():
        if name not in present:
            raise Corrupt(f"{shard_key(name)} is gone from {repository.store.url}")
    if not index.lacks_something:
        return
    needed = References()
    await references_of(Manifests(repository), base, needed)
    places: set[str] | None = None
    while lost := _lost(index, needed.frames):
        before, places = places, {name for pack, number in lost for name, _ in index.locate(pack, number)}
        if places == before:
            pack, number = lost[0]
            raise Corrupt(f"frame {number} of pack {pack.hex()} is in no object in {repository.store.url}")
        # A prune may have moved them since the index was read: then it names other objects by now.
        await index.refresh()
        await index.list_objects()


def _lost(index: PackIndex, needed: Frames) -> list[tuple[bytes, int]]:
    """(pack, number) of the needed frames that are nowhere."""
    return [each for each in _each(needed.items()) if not index.holds(*each)]


def _each(frames: Iterable[tuple[bytes, int]]) -> Iterable[tuple[bytes, int]]:
    return ((pack, number) for pack, bits in frames for number in numbers_of(bits))
