"""What a snapshot refers to: the frames and the shards that must not go away while it is there.

From the root down: its shards, the shards that these are patches on, the frames that their blocks lie in. A
frame is needed or not as a whole, and sets of frames are bits of an integer by pack, so that a TiB of
different blocks takes some 15 MB. Snapshots share shards: each is read once for all of them.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from blockstore.errors import CairnError, Corrupt, NotFound
from snapshotd.ahead import ahead
from snapshotd.inventory import INDEX_WIDTH
from snapshotd.layout import RootName, root_key, shard_key
from snapshotd.manifest import MAX_DEPTH, Shard, ShardObject, build_shard, decode_shard
from snapshotd.repository import Repository
from snapshotd.root import Root, decode_root
from snapshotd.root_objects import get_root

#: Decoded shard objects that are kept, because patches have their bases in common; 100 KB each on average.
_KEPT_SHARDS: Final = 256

Frames = dict[bytes, int]
"""By pack id, the numbers of frames as bits."""


@dataclass(slots=True)
class References:
    """frames: that hold needed blocks. shards: names of all that are needed, those below patches too."""

    frames: Frames = field(default_factory=dict)
    shards: set[str] = field(default_factory=set)

    def add_frames(self, frames: Frames) -> None:
        for pack, bits in frames.items():
            self.frames[pack] = self.frames.get(pack, 0) | bits

    def add(self, other: "References") -> None:
        self.add_frames(other.frames)
        self.shards |= other.shards


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """A shard of a manifest. names: of the objects that it is made of, the whole one first."""

    name: str
    names: tuple[str, ...]
    shard: Shard

    def frames(self) -> Frames:
        """The frames that its blocks lie in."""
        return {pack: bits_of(numbers) for pack, numbers in self.shard.frames().items()}


class DamagedObject(Corrupt):
    """An object that is not what it was when it was written. key: its key. gone: it is not there at all."""

    def __init__(self, key: str, why: str, *, gone: bool = False) -> None:
        super().__init__(why)
        self.key = key
        self.gone = gone


class Manifests:
    """Roots and shards as they are stored, checked on every read. It keeps the shards that patches build upon."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._kept: OrderedDict[str, ShardObject] = OrderedDict()

    async def root(self, snapshot: str, expected: bytes) -> Root:
        """The root that the catalog has; expected: its SHA-256. Raises DamagedObject; also where it is gone."""
        try:
            key, stored = await get_root(self._repository.store, snapshot, expected)
        except NotFound as error:
            raise self._gone(root_key(snapshot, expected)) from error
        return await self._decode_root(key, snapshot, stored, expected)

    async def root_named(self, name: RootName) -> Root:
        """A root by its key, whoever knows it. Raises DamagedObject; also where it is gone."""
        return await self._decode_root(name.key, name.snapshot, await self._get(name.key), name.digest)

    async def shard(self, name: str) -> LoadedShard:
        """The shard of that name with all below it. Raises DamagedObject, which names the one that is damaged."""
        chain = [await self._object(name)]
        while (base := chain[0].base) is not None:
            if len(chain) > MAX_DEPTH:
                raise DamagedObject(
                    shard_key(name), f"shard {name} is a patch on {base} and so on, over {MAX_DEPTH} deep"
                )
            chain.insert(0, await self._object(base))
        names = tuple(each.name for each in chain)
        try:
            return LoadedShard(name, names, await asyncio.to_thread(build_shard, chain))
        except Corrupt as error:
            raise DamagedObject(shard_key(name), str(error)) from error

    async def shards(self, names: Iterable[str]) -> AsyncGenerator[LoadedShard, None]:
        """Those shards in order, read ahead. Close it where it is not read to its end."""
        async with aclosing(ahead(self.shard, names, INDEX_WIDTH)) as loaded:
            async for each in loaded:
                yield each

    async def _decode_root(self, key: str, snapshot: str, stored: bytes, expected: bytes | None) -> Root:
        try:
            return await asyncio.to_thread(decode_root, self._repository.keys, snapshot, stored, expected)
        except Corrupt as error:
            raise DamagedObject(key, str(error)) from error

    async def _object(self, name: str) -> ShardObject:
        found = self._kept.get(name)
        if found is None:
            stored = await self._get(shard_key(name))
            try:
                found = await asyncio.to_thread(decode_shard, self._repository.keys, name, stored)
            except Corrupt as error:
                raise DamagedObject(shard_key(name), str(error)) from error
        self._kept[name] = found
        self._kept.move_to_end(name)
        if len(self._kept) > _KEPT_SHARDS:
            self._kept.popitem(last=False)
        return found

    async def _get(self, key: str) -> bytes:
        try:
            return await self._repository.store.get(key)
        except NotFound as error:
            raise self._gone(key) from error

    def _gone(self, key: str) -> DamagedObject:
        return DamagedObject(key, f"{key} is gone from {self._repository.store.url}", gone=True)


async def references_of(manifests: Manifests, root: Root, known: References) -> None:
    """Add all that `root` needs to `known`; shards that it names already are not read again.

    Raises DamagedObject.
    """
    new = sorted({name for name in root.shards.values() if name not in known.shards})
    async with aclosing(manifests.shards(new)) as loaded:
        async for each in loaded:
            known.add_frames(each.frames())
            known.shards.update(each.names)


def bits_of(numbers: Iterable[int]) -> int:
    """The frame numbers as bits."""
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits


def numbers_of(bits: int) -> list[int]:
    """The frame numbers that are set, in order."""
    numbers = []
    while bits:
        lowest = bits & -bits
        numbers.append(lowest.bit_length() - 1)
        bits ^= lowest
    return numbers


def damage_of(error: CairnError, key: str) -> tuple[str, str]:
    """(key of the object that is damaged, what is wrong with it); `key` where the error names none."""
    return (error.key, str(error)) if isinstance(error, DamagedObject) else (key, str(error))
