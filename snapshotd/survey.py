"""The manifests of many snapshots read once, with a note of who needs what.

Which snapshots need an object is kept as bits of an integer, one for each snapshot, by shard and by pack: a
few dozen bytes each, so a survey of thousands of snapshots takes what their different shards and packs take. A damaged
manifest is noted, with all who need it, and the survey goes on: others are not affected by it. So are the objects in
clear, which all of them need.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from blockstore.domain import SnapshotId
from blockstore.errors import Corrupt, InvalidRequest, NotFound
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.ahead import ahead
from snapshotd.inventory import INDEX_WIDTH, Inventory, take_inventory
from snapshotd.keyring import Keyring
from snapshotd.layout import INDEXES, pack_key
from snapshotd.prune_plan import missing_frames
from snapshotd.references import DamagedObject, LoadedShard, Manifests, References
from snapshotd.repository import Repository
from snapshotd.repository_objects import KEYS_FOLDER, REPOSITORY_KEY, decode_repository


class Problems:
    """What is wrong with which object, and who needs it."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], set[str]] = {}

    def add(self, key: str, message: str, snapshots: Iterable[str] = ()) -> None:
        self._found.setdefault((key, message), set()).update(snapshots)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def keys(self) -> set[str]:
        """Of the objects that something is wrong with."""
        return {key for key, _ in self._found}

    def messages(self) -> list[pb.StoreProblem]:
        """By key."""
        return [
            pb.StoreProblem(object=key, message=message, snapshots=sorted(snapshots))
            for (key, message), snapshots in sorted(self._found.items())
        ]


@dataclass(slots=True)
class Survey:
    """snapshots: in the order of the bits. needed, pack_users: of all of them, and of each pack."""

    snapshots: list[SnapshotId]
    problems: Problems = field(default_factory=Problems)
    needed: References = field(default_factory=References)
    pack_users: dict[bytes, int] = field(default_factory=dict)

    def names(self, bits: int) -> list[SnapshotId]:
        """The snapshots of those bits."""
        return [name for place, name in enumerate(self.snapshots) if bits >> place & 1]

    def users(self, packs: Iterable[bytes]) -> list[SnapshotId]:
        """The snapshots that need something in one of these packs."""
        bits = 0
        for pack in packs:
            bits |= self.pack_users.get(pack, 0)
        return self.names(bits)


async def read_manifests(
    repository: Repository, survey: Survey, expected: Mapping[SnapshotId, bytes]
) -> AsyncGenerator[tuple[int, int], None]:
    """Fill `survey` from the roots of its snapshots; (done, total) in shards. expected: SHA-256 of each root."""
    manifests = Manifests(repository)
    users: dict[str, int] = {}
    for place, snapshot in enumerate(survey.snapshots):
        try:
            root = await manifests.root(snapshot, expected[snapshot])
        except DamagedObject as error:
            survey.problems.add(error.key, str(error), [snapshot])
            continue
        for name in root.shards.values():
            users[name] = users.get(name, 0) | 1 << place

    async def load(name: str) -> tuple[str, LoadedShard | DamagedObject]:
        try:
            return name, await manifests.shard(name)
        except DamagedObject as error:
            return name, error

    done = 0
    async with aclosing(ahead(load, sorted(users), INDEX_WIDTH)) as loaded:
        async for name, found in loaded:
            _note(survey, users[name], found)
            done += 1
            yield done, len(users)


def _note(survey: Survey, users: int, found: LoadedShard | DamagedObject) -> None:
    if isinstance(found, DamagedObject):
        survey.problems.add(found.key, str(found), survey.names(users))
        return
    frames = found.frames()
    survey.needed.add_frames(frames)
    survey.needed.shards.update(found.names)
    for pack in frames:
        survey.pack_users[pack] = survey.pack_users.get(pack, 0) | users


async def check_clear_objects(repository: Repository, keyring: Callable[[], Keyring], survey: Survey) -> None:
    """Note what is wrong with `repository`, and with the data keys, without which nobody opens anything.

    keyring: opens it as it is now; that of a process which runs for long may have been lost or changed meanwhile.
    """
    try:
        decode_repository(await repository.store.get(REPOSITORY_KEY), REPOSITORY_KEY)
    except NotFound:
        survey.problems.add(REPOSITORY_KEY, "it is gone", survey.snapshots)
    except (Corrupt, InvalidRequest) as error:
        survey.problems.add(REPOSITORY_KEY, str(error), survey.snapshots)
    try:
        damaged = await repository.damaged_keys(await asyncio.to_thread(keyring))
    except (Corrupt, InvalidRequest, NotFound) as error:
        damaged = {KEYS_FOLDER: f"what opens the data keys cannot be used: {error}"}
    for key, message in damaged.items():
        survey.problems.add(key, message, survey.snapshots)


async def look_at_objects(repository: Repository, survey: Survey) -> Inventory:
    """The inventory; what is wrong with names, sizes and indexes is noted in `survey`."""
    damaged: dict[str, Corrupt] = {}
    inventory = await take_inventory(repository, damaged.__setitem__)
    listed = {entry.object: entry for index in inventory.indexes.values() for entry in index.entries}
    for name in inventory.replaced:
        listed.pop(name, None)
    present = (entry for name, entry in listed.items() if name in inventory.objects)
    missing = missing_frames(present, survey.needed.frames)
    for name, entry in listed.items():
        packs = [part.pack for part in entry.parts]
        size_bytes = inventory.objects.get(name)
        if size_bytes is None and not missing.keys().isdisjoint(packs):
            survey.problems.add(pack_key(name), "it is gone", survey.users(packs))
        elif size_bytes not in (None, entry.size):
            message = f"it has {size_bytes} bytes where its index says {entry.size}"
            survey.problems.add(pack_key(name), message, survey.users(packs))
    for key, error in damaged.items():
        survey.problems.add(key, str(error), survey.users(missing) if key.startswith(INDEXES) else ())
    if not any(key.startswith(INDEXES) for key in damaged):
        _note_unlisted(
            survey, inventory, missing.keys() - {part.pack for each in listed.values() for part in each.parts}
        )
    return inventory


def _note_unlisted(survey: Survey, inventory: Inventory, packs: Iterable[bytes]) -> None:
    """Needed packs that no index knows: their objects are there, or nothing is."""
    for pack in packs:
        names = [name for name, entry in inventory.orphans.items() if entry.part(pack)]
        for name in names:
            survey.problems.add(pack_key(name), "no index lists it: prune puts it into one", survey.users([pack]))
        if not names:
            survey.problems.add(INDEXES, f"no index says where pack {pack.hex()} is", survey.users([pack]))
