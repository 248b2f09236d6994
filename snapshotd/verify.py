"""Verify: everything that snapshots need is read again and checked, from their roots down.

The stored data keys by the keyring as it is now; roots against the catalog's hashes; shards against their names;
index objects against theirs; of each object of frames its name, its trailer, and of each frame the authentication and
the hashes of its blocks. A problem names one object and the snapshots that need something in it; the others are
untouched by it. With a sample, manifests are still read whole, and of the frames those that a hash of the seed, the
pack and the number picks: the same seed picks the same ones, another seed others.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from blockstore.domain import SnapshotId
from blockstore.errors import Corrupt, InvalidRequest, NotFound
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.ahead import ahead
from snapshotd.frame import decode_frame
from snapshotd.index import Frame, IndexEntry, Part
from snapshotd.inventory import Inventory, load_trailer
from snapshotd.keyring import Keyring
from snapshotd.layout import pack_key
from snapshotd.pack import Trailer, check_object
from snapshotd.repository import Repository
from snapshotd.roots import Catalog
from snapshotd.survey import Problems, Survey, check_clear_objects, look_at_objects, read_manifests

#: Whole objects in memory at once, 16 MiB each.
_WIDTH: Final = 4
_SCALE: Final = 2**64


@dataclass(frozen=True, slots=True)
class Progress:
    """done of total, in unit. problems: in the last one."""

    phase: str
    done: int
    total: int
    unit: str
    problems: Problems | None = None


@dataclass(frozen=True, slots=True)
class _Sample:
    """share: of the frames, in (0, 1]."""

    share: float
    seed: bytes

    def picks(self, pack: bytes, number: int) -> bool:
        digest = hashlib.sha256(self.seed + pack + number.to_bytes(4, "little")).digest()
        return int.from_bytes(digest[:8], "little") < self.share * _SCALE


async def verify(
    repository: Repository,
    catalog: Catalog,
    keyring: Callable[[], Keyring],
    snapshots: Collection[str],
    *,
    sample: float = 1.0,
    seed: bytes = b"",
) -> AsyncGenerator[Progress, None]:
    """Verify these completed snapshots, all where there are none.

    keyring: opens it as it is now. sample: share of frames that is read, (0, 1].

    Raises InvalidRequest, NotFound for a snapshot that is not completed, QuorumUnavailable.
    """
    if not 0 < sample <= 1:
        raise InvalidRequest(f"a sample of {sample:g}: it is more than 0 and at most 1")
    expected = (await catalog.roots()).completed
    chosen = [SnapshotId(each) for each in snapshots] or sorted(expected)
    for each in chosen:
        if each not in expected:
            raise NotFound(f"there is no completed snapshot {each}: see `cairn snapshot list`")
    survey = Survey(list(dict.fromkeys(chosen)))
    async with aclosing(read_manifests(repository, survey, expected)) as manifests:
        async for done, total in manifests:
            yield Progress("manifests", done, total, "shards")
    await check_clear_objects(repository, keyring, survey)
    inventory = await look_at_objects(repository, survey)
    async with aclosing(_read_objects(repository, survey, inventory, _Sample(sample, seed))) as objects:
        async for done, total in objects:
            yield Progress("packs", done, total, "bytes")
    yield Progress("packs", 0, 0, "bytes", survey.problems)


async def _read_objects(
    repository: Repository, survey: Survey, inventory: Inventory, sample: _Sample
) -> AsyncGenerator[tuple[int, int], None]:
    """Check all objects that hold something needed; (done, total) in stored bytes."""
    void = inventory.replaced
    entries = [
        entry
        for name, entry in sorted(inventory.entries.items())
        if name not in void and any(part.pack in survey.pack_users for part in entry.parts)
    ]
    total = sum(inventory.objects[entry.object] for entry in entries)

    async def check(entry: IndexEntry) -> int:
        size_bytes = inventory.objects[entry.object]
        try:
            if sample.share >= 1:
                await _check_whole(repository, entry)
            else:
                await _check_sample(repository, survey, entry, sample)
        except (Corrupt, NotFound) as error:
            survey.problems.add(pack_key(entry.object), str(error), survey.users(part.pack for part in entry.parts))
        return size_bytes

    done = 0
    async with aclosing(ahead(check, entries, _WIDTH)) as checked:
        async for size_bytes in checked:
            done += size_bytes
            yield done, total


async def _check_whole(repository: Repository, entry: IndexEntry) -> None:
    stored = await repository.store.get(pack_key(entry.object))
    trailer = await asyncio.to_thread(check_object, repository.keys, entry.object, stored)
    _check_parts(entry, trailer)


async def _check_sample(repository: Repository, survey: Survey, entry: IndexEntry, sample: _Sample) -> None:
    trailer = await load_trailer(repository, entry.object, entry.size)
    _check_parts(entry, trailer)
    for part, frame, hashes in _frames(trailer):
        is_needed = survey.needed.frames.get(part.pack, 0) >> frame.number & 1
        if is_needed and sample.picks(part.pack, frame.number):
            stored = await repository.store.get_range(pack_key(entry.object), frame.offset, frame.length)
            await asyncio.to_thread(_check_frame, repository, part.pack, frame.number, stored, hashes)


def _frames(trailer: Trailer) -> Iterator[tuple[Part, Frame, tuple[bytes, ...]]]:
    for part, of_frames in zip(trailer.parts, trailer.hashes, strict=True):
        for frame, hashes in zip(part, of_frames, strict=True):
            yield part, frame, hashes


def _check_frame(repository: Repository, pack: bytes, number: int, stored: bytes, hashes: tuple[bytes, ...]) -> None:
    blocks = decode_frame(repository.keys, pack, number, stored)
    if tuple(map(repository.keys.block_hash, blocks)) != hashes:
        raise Corrupt(f"the blocks of frame {number} of pack {pack.hex()} are not those that the trailer lists")


def _check_parts(entry: IndexEntry, trailer: Trailer) -> None:
    """Raises Corrupt where the index and the object's trailer say different things."""
    if entry.parts != trailer.parts:
        raise Corrupt(f"object {entry.object} has other frames than its index says")


def to_message(progress: Progress) -> pb.VerifyResponse:
    """One message of the stream."""
    work = pb.WorkProgress(phase=progress.phase, done=progress.done, total=progress.total, unit=progress.unit)
    return pb.VerifyResponse(progress=work, problems=progress.problems.messages() if progress.problems else ())
