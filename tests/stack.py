"""Three real nodes and a front-end's volume in one event loop: real gRPC, real disks, no control.

For tests that steer what happens between the parts. Whole processes are in tests/cluster.py.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import patch

from blockstore.config import NodeSettings
from blockstore.domain import (
    Configuration,
    Member,
    NodeId,
    Position,
    ReplicaAddress,
    ReplicaId,
    SegmentNumber,
    VolumeId,
    make_id,
)
from blockstore.errors import Corrupt
from blockstore.grpc_endpoint import Endpoint, open_channel
from blockstore.node.hosted_replica import HostedReplica
from blockstore.node.node import Node
from blockstore.node.replica_streams import ReplicaStreams
from blockstore.node.service import add_replica_service
from blockstore.replication.leader import LeaderSettings
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import replica_pb2, replica_pb2_grpc
from blockstore.units import MIB, Epoch
from blockstore.volume import open_volume
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.ticket import Ticket
from tests.patient_time import run_patiently

LIMIT_S = 60.0
#: Of a whole test: below pytest's own, so that what it says is where the test stands.
_TEST_LIMIT_S = 110.0
VOLUME = VolumeId(make_id("vol", bytes(9)))
SEGMENT = SegmentNumber(0)
#: Leases and heartbeats short, so that a test need not wait for them.
FAST = LeaderSettings(lease_s=0.2, drift_s=0.02, heartbeat_s=0.05, retry_limit_s=5.0)


async def until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Return once `condition` holds; fail after the limit, and say what did not come."""
    deadline = asyncio.get_running_loop().time() + limit_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {limit_s} s: {what}"
        await asyncio.sleep(0.01)


class RunningNode:
    """One node: its storage and its gRPC server."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.node = Node(settings)
        self._endpoint = Endpoint(settings.listen)
        self.streams = ReplicaStreams(self.node)
        add_replica_service(self.node, self.streams, settings, self._endpoint)
        self.address = ""

    async def start(self) -> None:
        if self.settings.streams_port >= 0:
            await self.streams.start("127.0.0.1", self.settings.streams_port)
        await self._endpoint.start()
        self.address = self._endpoint.address

    async def stop(self) -> None:
        self.streams.stop()
        await self._endpoint.stop(0)
        await self.node.close()


class Stack:
    """Nodes 0, 1, 2, each with replica 0, 1, 2 of one volume."""

    def __init__(
        self, directory: Path, node_settings: NodeSettings, leader_settings: LeaderSettings, disks: Mapping[int, Path]
    ) -> None:
        self.replicas = [ReplicaId(make_id("rep", bytes([index]) * 9)) for index in range(3)]
        self.leader_settings = leader_settings
        self.epoch = 0
        self.source = b""
        """What replicas that are created from now on are made from: a snapshot's id, or nothing."""
        self._settings = [
            dataclasses.replace(node_settings, data=disks.get(index, directory) / f"node{index}") for index in range(3)
        ]
        self._nodes: dict[int, RunningNode] = {}
        self._volumes: list[OpenVolume] = []

    def hosted(self, index: int) -> HostedReplica:
        return self._nodes[index].node.find_replica(self.replicas[index])

    def streams(self, index: int) -> ReplicaStreams:
        """Of a node that runs."""
        return self._nodes[index].streams

    def failed(self, index: int) -> "asyncio.Future[int]":
        """Done, with the exit code, when the node's process would end."""
        return self._nodes[index].node.failed

    def statuses(self, index: int) -> list[replica_pb2.ReplicaStatus]:
        """What a node says of its replicas."""
        return list(self._nodes[index].node.replica_statuses())

    def repair(self, index: int, error: Corrupt) -> None:
        """As where a node finds it."""
        self._nodes[index].node.repair(self.hosted(index), error)

    def repaired(self, index: int) -> int:
        """Bad blocks that were mended from peers since the node's start."""
        return sum(status.corrupt_blocks_repaired for status in self.statuses(index))

    async def begin_scrub(self, index: int, rate_bytes: int = 0) -> int:
        """As control does it for a user; the pass's number."""
        addresses = self.addresses()
        async with open_channel(addresses[self.replicas[index]]) as channel:
            request = replica_pb2.ScrubRequest(
                target=replica_pb2.Target(volume=VOLUME, segment=SEGMENT, replica=self.replicas[index]),
                peers=[replica_pb2.Peer(replica=each, address=addresses.get(each, "")) for each in self.replicas],
                rate_bytes=rate_bytes,
            )
            response: replica_pb2.ScrubResponse = await replica_pb2_grpc.ReplicaStub(channel).Scrub(request)
            return response.number

    def scrubbed(self, index: int) -> replica_pb2.ScrubStatus:
        """What a node says of its replica's scrub."""
        (status,) = (each for each in self.statuses(index) if each.target.replica == self.replicas[index])
        return status.scrub

    def lift_scrub_rate(self, index: int) -> None:
        """Of the pass that runs, which goes on at once."""
        scrubber, replica = self._nodes[index].node.scrubber, self.replicas[index]
        scrubber._state(self.hosted(index)).latest.rate_bytes = 0
        if replica in scrubber._running:
            scrubber._running[replica].ready_at = 0.0
            scrubber._wake.set()

    async def scrub(self, index: int) -> replica_pb2.ScrubStatus:
        """From its beginning to its end, begun by this call.

        The status is that of the newest pass: where the schedule has begun another meanwhile, nothing is known of ours.
        """
        while True:
            number = await self.begin_scrub(index)
            await until(lambda: self.scrubbed(index).ended >= number, f"the scrub of replica {index} is over")  # noqa: B023 - awaited in this round
            found = self.scrubbed(index)
            if found.number == number:
                return found

    async def start_node(self, index: int) -> None:
        node = self._nodes[index] = RunningNode(self._settings[index])
        await node.start()
        address = ReplicaAddress(VOLUME, SEGMENT, self.replicas[index])
        await node.node.create(address, filling=False, source=self.source)

    async def create_at(self, index: int, address: ReplicaAddress) -> None:
        """One more replica at a node, of any volume."""
        await self._nodes[index].node.create(address, filling=False)

    def find(self, index: int, address: ReplicaAddress) -> HostedReplica:
        """That replica."""
        return self._nodes[index].node.find(address)

    async def delete(self, index: int) -> None:
        """The replica of a node that goes on."""
        await self._nodes[index].node.delete(self.hosted(index).address)

    async def stop_node(self, index: int) -> None:
        await self._nodes.pop(index).stop()

    async def open(self, size_bytes: int, *, served: bool = True) -> OpenVolume:
        """Attach the volume at the next epoch."""
        self.epoch += 1
        members = tuple(Member(replica, NodeId(make_id("node", bytes(9)))) for replica in self.replicas)
        ticket = Ticket(
            volume=VOLUME,
            segment=SEGMENT,
            size_bytes=size_bytes,
            epoch=Epoch(self.epoch),
            configuration=Configuration(1, members),
            addresses=self.addresses(),
            known={},
        )
        volume = OpenVolume(ticket, self.leader_settings, 5.0, self._refresh)
        self._volumes.append(volume)
        if served:
            await asyncio.wait_for(volume.wait_until_served(), LIMIT_S)
        return volume

    def ticket(self, size_bytes: int) -> pb.OpenTicket:
        """As control gives it to a front-end, at the next epoch."""
        self.epoch += 1
        segments = self.where().segments
        return pb.OpenTicket(volume=VOLUME, name="disk", size_bytes=size_bytes, epoch=self.epoch, segments=segments)

    def where(self) -> pb.OpenTicket:
        """A ticket that says where the members are, and no more."""
        addresses, node = self.addresses(), make_id("node", bytes(9))
        members = [pb.Member(replica=each, node=node, address=addresses.get(each, "")) for each in self.replicas]
        return pb.OpenTicket(
            segments=[pb.Segment(number=SEGMENT, configuration=pb.Configuration(number=1, members=members))]
        )

    async def until_members(self, volume: OpenVolume, count: int) -> None:
        """So many are connected, and have all that is committed."""

        def connected() -> bool:
            status = volume.status()
            ready = [each for each in status.members if each.sealed and each.whole and each.matched >= status.commit]
            return len(ready) >= count

        await until(connected, f"{count} members are connected")

    async def until_gone(self, volume: OpenVolume, index: int) -> None:
        """The front-end has noticed that a node which was stopped is not there."""

        def gone() -> bool:
            return not any(each.sealed for each in volume.status().members if each.replica == self.replicas[index])

        await until(gone, f"node {index} is missed")

    async def until_all_know(self, volume: OpenVolume) -> None:
        """Every member is whole, and knows that everything is committed: what it shows is what was written."""
        await self._until_all_reach(volume, lambda hosted: hosted.follower.commit, "the commit arrives")

    async def until_all_applied(self, volume: OpenVolume) -> None:
        """Every member is whole, and has everything in its tables: they are the same."""
        await self._until_all_reach(volume, lambda hosted: hosted.store.applied, "all is in the tables")

    async def _until_all_reach(
        self, volume: OpenVolume, position: Callable[[HostedReplica], Position], what: str
    ) -> None:
        """Every member is whole, and this position of it is where everything is committed now."""
        await self.until_all_whole(volume)
        commit = volume.status().commit
        await until(lambda: all(position(self.hosted(index)) >= commit for index in self._nodes), what)

    async def until_all_whole(self, volume: OpenVolume) -> None:
        def whole() -> bool:
            status = volume.status()
            return all(member.whole and member.matched == status.end for member in status.members)

        await until(whole, "every member is whole and has the whole log")

    def addresses(self) -> dict[ReplicaId, str]:
        return {self.replicas[index]: node.address for index, node in self._nodes.items()}

    async def close(self) -> None:
        for volume in self._volumes:
            await volume.close()
        for index in list(self._nodes):
            await self.stop_node(index)

    async def _refresh(self) -> dict[ReplicaId, str]:
        return self.addresses()


@asynccontextmanager
async def running_stack(
    directory: Path,
    leader_settings: LeaderSettings = FAST,
    source: bytes = b"",
    disks: Mapping[int, Path] | None = None,
    **node_settings: float,
) -> AsyncIterator[Stack]:
    """A stack whose three nodes run; all is ended on the way out. disks: where some nodes' data lies instead."""
    settings = NodeSettings(**{"reserve_bytes": MIB, **node_settings})  # type: ignore[arg-type]
    stack = Stack(directory, settings, leader_settings, disks or {})
    stack.source = source
    try:
        for index in range(3):
            await stack.start_node(index)
        yield stack
    finally:
        await stack.close()


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, with a limit. Leases and limits count only the time in which this process is run."""

    async def limited() -> None:
        with patch.object(open_volume, "boot_time_s", asyncio.get_running_loop().time):
            await asyncio.wait_for(test(), _TEST_LIMIT_S)

    run_patiently(limited())
