"""The volumes that clients use, each with its model; and the snapshots of them, with what these must hold."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2
from blockstore.units import BLOCK_SIZE
from tests.cluster_simulation.client import Client
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.model import IN_TURN, VolumeModel

#: Blocks that one client writes alone.
SHARE: Final = 176
SHIPPED_S: Final = 300.0
COMPLETED, FAILED = snapshot_pb2.SNAPSHOT_STATE_COMPLETED, snapshot_pb2.SNAPSHOT_STATE_ERROR


@dataclass(eq=False, slots=True)
class Guest:
    """A volume in use."""

    volume: str
    model: VolumeModel
    clients: dict[Client, asyncio.Task[None]] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Part:
    """One volume's snapshot. low: its writes that were acknowledged before; high: those begun before it was sealed.

    asked_at, sealed_at: when that was.
    """

    id: str
    volume: str
    model: VolumeModel
    low: list[int]
    asked_at: float
    high: list[int] = field(default_factory=list)
    sealed_at: float = 0.0


class Guests:
    """All volumes in use."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._longest_s = 0.0
        self._operations = 0
        self.guests: list[Guest] = []
        self.parts: list[list[Part]] = []
        """The snapshots that were taken and not deleted; those of one moment together."""
        self.held = Counter[Part]()
        """Those of which somebody makes volumes, and how many do: they are not deleted meanwhile."""
        self.restored = 0

    def use(self, volume: str, model: VolumeModel) -> Guest:
        """Clients for all its blocks, from now on."""
        guest = Guest(volume, model)
        self.guests.append(guest)
        self._add_clients(guest, IN_TURN + 1, len(model.blocks))
        return guest

    def grow(self, guest: Guest, blocks: int) -> None:
        """It has become that large."""
        before = len(guest.model.blocks)
        if blocks > before:
            guest.model.grow(blocks)
            self._add_clients(guest, before, blocks)

    def _add_clients(self, guest: Guest, first: int, end: int) -> None:
        for start in range(first, end, SHARE):
            client = Client(self._cluster, guest.volume, guest.model, start, min(start + SHARE, end))
            guest.clients[client] = asyncio.create_task(client.run())

    async def stop(self, guest: Guest) -> None:
        """Its clients end; it is no longer one of these."""
        self.guests.remove(guest)
        await self.rest([guest])

    async def rest(self, guests: list[Guest]) -> None:
        """Their clients end. Raises what one of them found."""
        running = [task for guest in guests for task in guest.clients.values()]
        for guest in guests:
            for client in guest.clients:
                client.stopping = True
        await asyncio.gather(*running)
        for guest in guests:
            self._longest_s = max([self._longest_s, *(client.longest_s for client in guest.clients)])
            self._operations += guest.model.operations
            guest.clients.clear()

    @property
    def running(self) -> list[asyncio.Task[None]]:
        return [task for guest in self.guests for task in guest.clients.values()]

    @property
    def longest_s(self) -> float:
        return self._longest_s

    @property
    def operations(self) -> int:
        """Of those whose clients have ended."""
        return self._operations

    async def snapshot(self, chosen: list[Guest], token: str) -> list[Part]:
        """Of these volumes at one instant; sealed, or failed, by now."""
        now = self._cluster.loop.time()
        parts = [Part("", each.volume, each.model, each.model.mark(), now) for each in chosen]
        request = snapshot_pb2.CreateSnapshotRequest(volumes=[each.volume for each in chosen], client_token=token)
        for part, made in zip(parts, (await self._cluster.call("CreateSnapshot", request)).snapshots, strict=True):
            part.id = made.id
        self.parts.append(parts)
        # It may be answered while they are pending: their content is fixed a little later.
        for part in parts:
            await self._until_sealed(part)
            part.high, part.sealed_at = part.model.begun(), self._cluster.loop.time()
        return parts

    async def _until_sealed(self, part: Part) -> None:
        async def sealed() -> bool:
            found = await self._cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=part.id))
            return bool(found.sealed_at_ms) or found.state != snapshot_pb2.SNAPSHOT_STATE_PENDING

        await self._cluster.until(f"{part.id} is sealed, or failed", sealed)

    # ---- looking at what is there

    async def check(self, guest: Guest) -> None:
        """Its clients have ended: read every block."""
        assert not guest.clients, "what one has written meanwhile would be missed"
        reader = Client(self._cluster, guest.volume, guest.model, 0, len(guest.model.blocks))
        asked_at = self._cluster.loop.time()
        for number, value in enumerate(await reader.read_all()):
            where = f"block {number} of {guest.volume} at the end"
            guest.model.saw(number, value, asked_at, self._cluster.loop.time(), where)
        await reader.close()

    async def content(self, volume: str, blocks: int) -> list[int]:
        """The value of each block, while it hydrates."""
        reader = Client(self._cluster, volume, VolumeModel(blocks), 0, blocks)
        content = await reader.read_all()
        await reader.close()
        return content

    async def delete(self, volume: str) -> None:
        await self._cluster.call("DetachVolume", pb.DetachVolumeRequest(volume=volume, force=True))
        await self._cluster.call("DeleteVolume", pb.DeleteVolumeRequest(volume=volume))

    async def is_completed(self, part: Part) -> bool:
        """Whether it is whole in the object store, once that is decided; False where it could not be sealed."""

        async def decided() -> bool:
            return bool(await self.state(part) != snapshot_pb2.SNAPSHOT_STATE_PENDING)

        await self._cluster.until(f"{part.id} is shipped", decided, SHIPPED_S)
        return bool(await self.state(part) == COMPLETED)

    async def state(self, part: Part) -> Any:
        """None where it is gone."""
        try:
            return (await self._cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=part.id))).state
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return None

    async def restore(self, part: Part) -> tuple[str, list[int], tuple[float, float]]:
        """A volume made from it, its content, and between which moments that was there.

        Raises AssertionError where it was in none.
        """
        found = await self._cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=part.id))
        blocks = found.size_bytes // BLOCK_SIZE
        high = part.high or part.model.begun()
        what = f"{part.id} of {part.volume}"
        most = max(len(high), part.model.asked_blocks)
        assert len(part.low) <= blocks <= most, f"{what} has {blocks} blocks: {len(part.low)} to {most}"
        part.model.grow(blocks)
        high = [*high, *([0] * (blocks - len(high)))]
        volume = await self._cluster.create(snapshot=part.id)
        content = await self.content(volume, blocks)
        moment = part.model.moment(content, part.low, high, what)
        part.model.saw_hot(content, part.asked_at, part.sealed_at or self._cluster.loop.time())
        self.restored += 1
        return volume, content, moment

    async def check_together(self, parts: list[Part]) -> None:
        """Each in a volume made from it, those that came to be, and all of them together."""
        done = [part for part in parts if await self.is_completed(part)]
        moments = []
        for part in done:
            volume, _, moment = await self.restore(part)
            await self.delete(volume)
            moments.append(moment)
        check_one_moment(done, moments)


def check_one_moment(parts: list[Part], moments: list[tuple[float, float]]) -> None:
    """Snapshots that were taken together are of one moment. Raises AssertionError."""
    not_before = max((moment[0] for moment in moments), default=0.0)
    not_after = min((moment[1] for moment in moments), default=0.0)
    assert not_before <= not_after, f"{[part.id for part in parts]} are of several moments: {moments}"
