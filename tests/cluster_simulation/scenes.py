"""Orders of events that one rule is there for, and that chance alone would bring about in one seed of thousands.

Each begins with a cluster that is whole. Who has which part in it is drawn, and how long everything takes.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import grpc

from blockstore.rpc import control_pb2 as pb
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.guests import Guest, Guests, Part
from tests.cluster_simulation.model import VolumeModel
from tests.cluster_simulation.network import Link
from tests.cluster_simulation.visitors import Visitor
from tests.nbd_client import NbdClient

#: How long somebody is watched who is about to be cut off, and what follows goes on.
_BEFORE_S: Final = 0.05, 0.5
_LASTS_S: Final = 1.5, 4.0
_CONNECTS_S: Final = 5.0
_WATCHED_S: Final = 60.0
_MEMBERS: Final = 3
#: Until who serves a volume has heard of a newcomer, and is still filling it.
_HEARD_S: Final = 0.0, 2.0
_SOON_S, _LOOK_S = 8.0, 0.05
#: Of each message to and from one that is late; how long a volume is used that hydrates from a source that is.
_LATE_S: Final = 0.0, 0.5
_HYDRATES_S: Final = 2.0, 6.0


@dataclass(frozen=True, slots=True)
class Place:
    """Who serves a volume, under which address, and the names of the nodes that hold its first segment."""

    front_end: str
    uri: str
    nodes: tuple[str, ...]


class Scenes:
    """On the volume that nobody deletes."""

    def __init__(self, cluster: SimulatedCluster, guests: Guests, random: Random) -> None:
        self._cluster, self._guests, self._random = cluster, guests, random

    async def taken_over(self) -> None:
        """Who serves it is cut off together with one of its nodes, and read through all the while (rule 4).

        It is attached elsewhere, where it is written to at once.
        """
        guest = self._guests.guests[0]
        place = await self._place(guest)
        watcher = await self._visitor(guest, place.uri, writes=False) if place else None
        if place is None or watcher is None:
            return
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watcher.run(_WATCHED_S))
            await asyncio.sleep(self._random.uniform(*_BEFORE_S))
            mend = self._cut_off({place.front_end, self._random.choice(place.nodes)})
            try:
                await self._use_elsewhere(guest, place)
            finally:
                mend()
                watching.cancel()
        guest.model.check()

    async def _use_elsewhere(self, guest: Guest, place: Place) -> None:
        uri = await self._attach_elsewhere(guest, place)
        if uri and (writer := await self._visitor(guest, uri, writes=True)):
            await writer.run(self._random.uniform(*_LASTS_S))

    async def cut_off_changing(self) -> None:
        """Who serves it, with a quorum of its old members, goes on as if a change of members had not begun (rule 7).

        Control made that joint, and the word was lost. On the other side is a quorum of the new members.
        """
        guest = self._guests.guests[0]
        place = await self._place(guest)
        if place is None:
            return
        leaving, staying = self._random.sample(place.nodes, 2)
        request = pb.DrainNodeRequest(node=await self._node_id(leaving))
        await self._cluster.call("DrainNode", request)
        try:
            if await self._is_joint(guest, place):
                await self._use_both_sides(guest, place, {place.front_end, leaving, staying})
        finally:
            request.undo = True
            await self._cluster.call("DrainNode", request)
        guest.model.check()

    async def _is_joint(self, guest: Guest, place: Place) -> bool:
        """Once it is, which who serves it does not hear; False where that did not come about."""
        if not await self._soon(lambda: self._changes(guest, "replacement")):
            return False
        await asyncio.sleep(self._random.uniform(*_HEARD_S))
        mend = self._cluster.network.cut((control, place.front_end) for control in self._cluster.of_kind("control"))
        try:
            return await self._soon(lambda: self._changes(guest, "old_members"))
        finally:
            mend()

    async def _use_both_sides(self, guest: Guest, place: Place, here: set[str]) -> None:
        mend = self._cut_off(here)
        try:
            if old := await self._visitor(guest, place.uri, writes=True):
                await old.run(self._random.uniform(*_BEFORE_S))
            await self._use_elsewhere(guest, place)
        finally:
            mend()

    async def sealed_late(self) -> None:
        """A snapshot of two volumes, one of which hears late that it is to be sealed (rule 8)."""
        guests, place = self._guests.guests[:2], await self._place(self._guests.guests[0])
        if place is None or len(guests) < 2:
            return
        await self._attach_elsewhere(guests[1], place)
        if not await self._soon(lambda: self._is_served(guests[1])):
            return
        late = next(name for name in self._cluster.of_kind("front-end") if name != place.front_end)
        links = [(control, late) for control in self._cluster.of_kind("control")]
        with self._slow(*links):
            parts = await self._guests.snapshot(guests, f"scene-{self._random.getrandbits(64):x}")
        await self._guests.check_together(parts)

    async def used_while_it_hydrates(self) -> None:
        """A volume is written to from its first moment on, while its source is slow: no fill covers a write."""
        (part,) = await self._guests.snapshot(self._guests.guests[:1], f"scene-{self._random.getrandbits(64):x}")
        self._guests.held[part] += 1
        try:
            if await self._guests.is_completed(part):
                await self._use_while_it_hydrates(part)
        finally:
            self._guests.held[part] -= 1

    async def _use_while_it_hydrates(self, part: Part) -> None:
        looked_at, content, _ = await self._guests.restore(part)
        await self._guests.delete(looked_at)
        with self._slow(*self._cluster.of_kind("snapshotd")):
            volume = await self._cluster.create(snapshot=part.id)
            guest = self._guests.use(volume, VolumeModel(len(content), content, part.model.last_number))
            await asyncio.sleep(self._random.uniform(*_HYDRATES_S))
        await self._guests.stop(guest)
        await self._guests.check(guest)
        guest.model.check()
        await self._guests.delete(volume)

    # ---- who is who

    async def _changes(self, guest: Guest, what: str) -> bool:
        """Whether its first segment's configuration has that."""
        found = await self._cluster.call("GetVolume", pb.GetVolumeRequest(volume=guest.volume))
        configuration = found.segments[0].configuration
        return bool(configuration.old_members) if what == "old_members" else configuration.HasField(what)

    async def _soon(self, condition: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
        """Whether it comes true in time."""
        give_up = self._cluster.loop.time() + _SOON_S
        while self._cluster.loop.time() < give_up:
            if await condition():
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    async def _node_id(self, name: str) -> str:
        nodes: Any = (await self._cluster.status()).nodes
        return next(str(each.id) for each in nodes if self._cluster.name_at(each.address) == name)

    async def beside(self, node: str) -> tuple[str, str]:
        """Two more nodes: with this one all members of some segment, where it is a member of any."""
        status = await self._cluster.status()
        names = {each.id: self._cluster.name_at(each.address) for each in status.nodes}
        sets: dict[tuple[str, int], set[str]] = {}
        for volume in status.volumes:
            for replica in volume.replicas:
                sets.setdefault((volume.volume.id, replica.segment), set()).add(names[replica.node])
        others = [sorted(each - {node}) for each in sets.values() if node in each and len(each) == _MEMBERS]
        rest = [each for each in self._cluster.of_kind("node") if each != node]
        one, other = self._random.sample(self._random.choice(others) if others else rest, 2)
        return one, other

    async def _place(self, guest: Guest) -> Place | None:
        """None where nobody serves it."""
        status = await self._cluster.status()
        health = next((each for each in status.volumes if each.volume.id == guest.volume), None)
        if health is None or health.serving != "serving":
            return None
        names = {each.id: self._cluster.name_at(each.address) for each in status.nodes}
        front_ends = {each.id: self._cluster.name_at(each.address) for each in status.front_ends}
        attachment = health.volume.attachment
        nodes = tuple(names[each.node] for each in health.replicas if not each.segment and not each.replaces)
        return Place(front_ends[attachment.front_end], attachment.uris[0], nodes)

    def _cut_off(self, here: set[str]) -> Callable[[], None]:
        """These and nobody else hear each other."""
        others = [name for name in self._cluster.names if name not in here]
        between = [(one, other) for one in sorted(here) for other in others]
        return self._cluster.network.cut(between + [(other, one) for one, other in between])

    @contextmanager
    def _slow(self, *those: str | Link) -> Iterator[None]:
        """Messages to and from these processes, or over these links, are late."""
        latency_of = self._cluster.network.latency_of
        latency_of.update(dict.fromkeys(those, _LATE_S))
        try:
            yield
        finally:
            for each in those:
                latency_of.pop(each, None)

    async def _is_served(self, guest: Guest) -> bool:
        return await self._place(guest) is not None

    async def _attach_elsewhere(self, guest: Guest, place: Place) -> str:
        """Take it away from who has it; where it is to be found, empty where that was refused."""
        status = await self._cluster.status()
        others = [each for each in status.front_ends if self._cluster.name_at(each.address) != place.front_end]
        request = pb.AttachVolumeRequest(volume=guest.volume, front_end=others[0].id, force=True)
        try:
            return str((await self._cluster.call("AttachVolume", request, 0)).attachment.uris[0])
        except grpc.aio.AioRpcError:
            return ""

    async def _visitor(self, guest: Guest, uri: str, *, writes: bool) -> Visitor | None:
        """None where nobody serves it there, or not for long."""
        try:
            client = await NbdClient.connect_soon(uri, _CONNECTS_S)
        except TimeoutError:
            return None
        return Visitor(self._cluster, guest.model, client, writes=writes)
