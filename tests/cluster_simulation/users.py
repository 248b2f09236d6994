"""What people do with a cluster at random, while faults happen: each kind of work goes on beside the others.

What control refuses is nobody's mistake here: a volume is about to be deleted, a node has no room. What it must never
say (INTERNAL, UNKNOWN, DATA_LOSS) is raised.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, Final

import grpc

from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2
from blockstore.units import BLOCK_SIZE, MIB
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.guests import COMPLETED, Guest, Guests, check_one_moment
from tests.cluster_simulation.model import VolumeModel

_MOST_VOLUMES: Final = 4
_MOST_BLOCKS: Final = 1024
_REFUSED: Final = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}

Work = Callable[[], Coroutine[Any, Any, None]]


class Users:
    """count: of what was done and not refused, by kind."""

    def __init__(self, cluster: SimulatedCluster, guests: Guests) -> None:
        self._cluster, self._guests = cluster, guests
        self._random = Random(cluster.loop.random.getrandbits(64))
        self._drained: list[str] = []
        self.count: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled. Raises AssertionError where something is not as it must be."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again((1.0, 6.0), self._snapshot))
            group.create_task(self._again((4.0, 12.0), self._restore))
            group.create_task(self._again((4.0, 12.0), self._delete_snapshots, self._prune))
            group.create_task(self._again((4.0, 12.0), self._create, self._delete_volume, self._grow))
            group.create_task(
                self._again((2.0, 8.0), self._move, self._move, self._scrub, self._drain, self._rebalance)
            )

    async def _again(self, pause_s: tuple[float, float], *works: Work) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(*pause_s))
            work = self._random.choice(works)
            try:
                await work()
            except grpc.aio.AioRpcError as error:
                if error.code() not in _REFUSED:
                    raise AssertionError(f"{work.__name__}: {error.code().name}: {error.details()}") from error
            else:
                self.count[work.__name__.strip("_")] += 1

    async def end(self) -> None:
        """Undo what would stay as it is."""
        for node in self._drained:
            await self._cluster.call("DrainNode", pb.DrainNodeRequest(node=node, undo=True))
        self._drained.clear()

    # ---- snapshots

    async def _snapshot(self) -> None:
        """Of one volume, or of several at one instant."""
        volumes = list(self._guests.guests)
        chosen = self._random.sample(volumes, self._random.choice((1, len(volumes))))
        await self._guests.snapshot(chosen, f"snapshot-{self._random.getrandbits(64):x}")

    async def _delete_snapshots(self) -> None:
        """Also those that are shipped at the moment."""
        for parts in self._random.sample(self._guests.parts, len(self._guests.parts) // 2):
            if not any(self._guests.held[part] for part in parts):
                self._guests.parts.remove(parts)
                for part in parts:
                    await self._cluster.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=part.id))

    async def _prune(self) -> None:
        await self._cluster.call_store("Prune", snapshot_pb2.PruneRequest(), 0)

    async def _restore(self) -> None:
        """What it holds is looked at while that hydrates; then the volume is used, or is deleted."""
        if not self._guests.parts:
            return
        parts = self._random.choice(self._guests.parts)
        self._guests.held.update(parts)
        try:
            done = [part for part in parts if await self._guests.state(part) == COMPLETED]
            restored = [await self._guests.restore(part) for part in done]
            check_one_moment(done, [moment for _, _, moment in restored])
        finally:
            self._guests.held.subtract(parts)
        for part, (volume, content, _) in zip(done, restored, strict=True):
            if len(self._guests.guests) < _MOST_VOLUMES:
                self._guests.use(volume, VolumeModel(len(content), content, part.model.last_number))
            else:
                await self._guests.delete(volume)

    # ---- volumes

    async def _create(self) -> None:
        if len(self._guests.guests) < _MOST_VOLUMES:
            await create(self._cluster, self._guests, self._random)

    async def _delete_volume(self) -> None:
        """One of those that came later: with its snapshots, or they stay behind."""
        later = self._guests.guests[1:]
        if later:
            guest = self._random.choice(later)
            await self._guests.stop(guest)
            guest.model.check()
            for _ in range(20):  # refused while a snapshot of it is pending
                try:
                    await self._guests.delete(guest.volume)
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _REFUSED:
                        raise
                await asyncio.sleep(2.0)
            self._guests.use(guest.volume, guest.model)

    async def _grow(self) -> None:
        guest = self._random.choice(self._guests.guests)
        blocks = min(_MOST_BLOCKS, len(guest.model.blocks) + self._random.choice((1, 64, 256)))
        guest.model.asked_blocks = max(guest.model.asked_blocks, blocks)
        request = pb.ResizeVolumeRequest(volume=guest.volume, size_bytes=blocks * BLOCK_SIZE)
        await self._cluster.call("ResizeVolume", request)
        found = await self._cluster.call("GetVolume", pb.GetVolumeRequest(volume=guest.volume))
        self._guests.grow(guest, found.size_bytes // BLOCK_SIZE)

    async def _move(self) -> None:
        """Attach it somewhere, by force: whoever had it is fenced."""
        guest = self._random.choice(self._guests.guests)
        front_ends = (await self._cluster.status()).front_ends
        if front_ends:
            await self._cluster.attach(guest.volume, self._random.choice(list(front_ends)).id)

    async def _scrub(self) -> None:
        guest = self._random.choice(self._guests.guests)
        await self._cluster.call("ScrubVolume", pb.ScrubVolumeRequest(volume=guest.volume), 0)

    # ---- members

    async def _drain(self) -> None:
        """One node at a time, for a while."""
        if self._drained:
            await self.end()
            return
        node = self._random.choice(list((await self._cluster.status()).nodes)).id
        await self._cluster.call("DrainNode", pb.DrainNodeRequest(node=node))
        self._drained.append(node)

    async def _rebalance(self) -> None:
        await self._cluster.call("Rebalance", pb.RebalanceRequest())


async def create(cluster: SimulatedCluster, guests: Guests, random: Random) -> Guest:
    """A volume of one to three segments, in use."""
    blocks = random.choice((256, 300, 512, 700))
    volume = await cluster.create(blocks * BLOCK_SIZE, segment_size_bytes=random.choice((MIB, MIB, 64 * MIB)))
    return guests.use(volume, VolumeModel(blocks))
