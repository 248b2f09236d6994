"""The manifest of a snapshot that is being written: which shards changed against the base, and how each is stored.

Changes are gathered by shard. A shard is written once all packs that it names are stored and indexed; as a patch on
the base's shard where that is cheaper, else whole; not at all where nothing differs. A shard in which nothing changed
stays the base's. One that changes again after it was written is patched or written anew on what was written.
"""

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

from blockstore.errors import Corrupt, NotFound, QuorumUnavailable
from blockstore.units import BLOCK_SIZE
from snapshotd.ahead import ahead
from snapshotd.crypto import SALT_SIZE
from snapshotd.layout import shard_key
from snapshotd.manifest import SHARD_BLOCKS, BlockRef, Shard, encode_patch, encode_shard, should_patch
from snapshotd.pack_store import PackStore
from snapshotd.prune_plan import mark
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root

Changes = Mapping[int, BlockRef | None]
"""By block of the shard; None for what is not mapped any more."""


@dataclass(slots=True)
class _Written:
    """One shard's outcome. name: None where it maps nothing; the rest: how blocks and bytes changed."""

    number: int
    name: str | None
    logical_blocks: int = 0
    changed_blocks: int = 0
    removed_blocks: int = 0
    stored_bytes: int = 0


class ShardWriter:
    """Of one snapshot. base: None where it has none."""

    def __init__(self, packs: PackStore, reader: SnapshotReader, base: Root | None) -> None:
        self.shards: dict[int, str] = dict(base.shards) if base else {}
        """By number, the names of the shards as written so far."""
        self.logical_blocks = base.statistics.logical_bytes // BLOCK_SIZE if base else 0
        """That are mapped."""
        self.changed_blocks = 0
        """That differ from the base."""
        self.removed_blocks = 0
        """Of these, those that are not mapped any more."""
        self.stored_bytes = 0
        self.count = 0
        """Changes that are gathered and not written."""
        self._packs = packs
        self._reader = reader
        self._base: Mapping[int, str] = dict(self.shards)
        self._written: set[int] = set()
        """Numbers of the shards that are not the base's."""
        self._changes: dict[int, dict[int, BlockRef | None]] = {}

    def set(self, start: int, refs: Sequence[BlockRef | None]) -> None:
        """Of the volume's blocks from `start` on, within one shard: where each is now, None where it is all zeroes."""
        number, first = divmod(start, SHARD_BLOCKS)
        changes = self._changes.get(number)
        if changes is None:
            changes = self._changes[number] = {}
        before = len(changes)
        changes.update(enumerate(refs, first))
        self.count += len(changes) - before

    async def write(self) -> None:
        """Write all shards with changes. Raises QuorumUnavailable where a pack that they name was given up."""
        work, self._changes, self.count = self._changes, {}, 0
        frames: dict[bytes, set[int]] = {}
        refs = filter(None, chain.from_iterable(changes.values() for changes in work.values()))
        for pack, frame in set(map(itemgetter(0, 1), refs)):
            frames.setdefault(pack, set()).add(frame)
        await self._packs.indexed(frames)
        async with aclosing(ahead(self._write_one, list(work.items()))) as written:
            async for each in written:
                self._note(each)

    async def lost(self, quarantined: Collection[bytes]) -> list[int]:
        """Numbers of shards written here that somebody means to delete, or has deleted: no root named them.

        A patch goes with what it is a patch on: one that was written here, too, is known to no root either.
        """
        written = sorted(self._written & self.shards.keys())
        return [number for number in written if not await self._stays(number, quarantined)]

    async def _stays(self, number: int, quarantined: Collection[bytes]) -> bool:
        name: str | None = self.shards[number]
        try:
            while name is not None and name != self._base.get(number):
                if mark(name) in quarantined:
                    return False
                await self._packs.repository.store.get_range(shard_key(name), 0, 1)
                name = (await self._reader.stored_shard(name, background=True)).base
        except (NotFound, Corrupt):
            return False
        return True

    async def write_again(self, numbers: Iterable[int]) -> None:
        """Store these shards whole, under new names. Raises QuorumUnavailable where one cannot be read any more."""
        for number in numbers:
            with self._reading(number):
                old = await self._reader.shard_named(self.shards[number], background=True)
            self.shards[number], size_bytes = await self._store(old, None, None, {}, len(old))
            self.stored_bytes += size_bytes

    def _note(self, written: _Written) -> None:
        if written.stored_bytes:
            self._written.add(written.number)
        if written.name is None:
            self.shards.pop(written.number, None)
        else:
            self.shards[written.number] = written.name
        self.logical_blocks += written.logical_blocks
        self.changed_blocks += written.changed_blocks
        self.removed_blocks += written.removed_blocks
        self.stored_bytes += written.stored_bytes

    @contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Raises QuorumUnavailable, not Corrupt, where that shard was written here: a prune may take it.

        No root names it yet. One that is the base's is needed by a root; it is damaged where it cannot be read.
        """
        try:
            yield
        except Corrupt as error:
            if self.shards.get(number) == self._base.get(number):
                raise
            raise QuorumUnavailable(f"a prune took a shard before the snapshot was complete: {error}") from error

    async def _write_one(self, item: tuple[int, Changes]) -> _Written:
        number, changes = item
        name = self.shards.get(number)
        with self._reading(number):
            old = await self._reader.shard_named(name, background=True) if name else Shard()
        differing, added, removed, mapped = await self._packs.in_thread(_compare, old, changes)
        if not differing:
            return _Written(number, name)
        result = _Written(number, None, added - removed, len(differing), removed)
        if mapped:
            with self._reading(number):
                depth = (await self._reader.stored_shard(name, background=True)).depth if name else None
            result.name, result.stored_bytes = await self._store(old, name, depth, differing, mapped)
        return result

    async def _store(
        self, old: Shard, name: str | None, depth: int | None, changes: Changes, mapped: int
    ) -> tuple[str, int]:
        """(name, size in bytes) of the object."""
        new, stored = await self._packs.in_thread(self._encode, old, name, depth, changes, mapped)
        await self._packs.repository.store.put(shard_key(new), stored)
        return new, len(stored)

    def _encode(
        self, old: Shard, name: str | None, depth: int | None, changes: Changes, mapped: int
    ) -> tuple[str, bytes]:
        keys, salt = self._packs.repository.keys, secrets.token_bytes(SALT_SIZE)
        if name is not None and depth is not None and should_patch(depth, len(changes), mapped):
            return encode_patch(keys, name, depth + 1, changes, salt)
        shard = old.copy()
        shard.apply(changes)
        return encode_shard(keys, shard, salt)


def _compare(old: Shard, changes: Changes) -> tuple[Changes, int, int, int]:
    """Those of the changes that change something; how many blocks they add and remove; how many are mapped then.

    Some milliseconds for a whole shard: on a thread, for guests' reads come through this process as well.
    """
    differing = old.differing(changes)
    added = sum(ref is not None and old[block] is None for block, ref in differing.items())
    removed = sum(ref is None for ref in differing.values())
    return differing, added, removed, len(old) + added - removed
