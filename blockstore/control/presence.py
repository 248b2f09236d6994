"""Who is there: the last word of each node, front-end and snapshotd, in memory only.

A process is up while its lease holds: it was heard within `lease_s`. After a start of control
nobody is up until heard. What is known here is never a reason to give up data: it picks nodes for
new replicas, tells whom to call, and makes the status.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from blockstore.domain import DaemonId, FrontEndId, NodeId, ReplicaId, SnapshotId, VolumeId
from blockstore.rpc.control_pb2 import VolumeReport
from blockstore.rpc.replica_pb2 import ReplicaStatus
from blockstore.rpc.snapshot_pb2 import ShipProgress


@dataclass(frozen=True, slots=True)
class NodeWord:
    """A node's heartbeat. replicas: None until it reported them for the first time. broken: by the place where what is
    left of them is, those of which it can make nothing.

    heard_at: by control's own clock; tells which of two words is the later one.
    """

    at_ms: int
    heard_at: float
    capacity_bytes: int = 0
    used_bytes: int = 0
    full: bool = False
    replicas: Mapping[ReplicaId, ReplicaStatus] | None = None
    broken: Mapping[str, ReplicaId] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FrontEndWord:
    """A front-end's last heartbeat: what it says of each volume that it has."""

    at_ms: int
    volumes: Mapping[VolumeId, VolumeReport] = field(default_factory=dict)
    shows_snapshots: bool = False


@dataclass(frozen=True, slots=True)
class DaemonWord:
    """A snapshotd's last heartbeat: what it ships, how far it is, and what keeps it from writing, if anything does."""

    at_ms: int
    snapshots: Mapping[SnapshotId, ShipProgress] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True, slots=True)
class Starting:
    """A snapshotd that was started and has not registered: it has no repository yet, and says why if it knows.

    since, heard_at: its first and its last word, by control's own clock.
    """

    since: float
    heard_at: float
    why: str


class Presence:
    """The last words, and whose lease holds.

    clock: seconds, never falling. wall_ms: milliseconds since 1970, for people only.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float], wall_ms: Callable[[], int]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._wall_ms = wall_ms
        self._heard: dict[str, float] = {}
        self._nodes: dict[NodeId, NodeWord] = {}
        self._earlier: dict[NodeId, NodeWord] = {}
        self._front_ends: dict[FrontEndId, FrontEndWord] = {}
        self._daemons: dict[DaemonId, DaemonWord] = {}
        self._starting: dict[DaemonId, Starting] = {}
        self._created: dict[ReplicaId, float] = {}
        self._read: dict[SnapshotId, float] = {}
        """When a front-end last said that a client of its reads the snapshot."""
        self._beat = asyncio.Event()
        self.started_at: Final = clock()

    def node_registered(self, node: NodeId, capacity_bytes: int) -> None:
        """It may be called from now on; what it holds it says with its next heartbeat."""
        self._nodes[node] = NodeWord(self._wall_ms(), self._clock(), capacity_bytes)
        self._earlier.pop(node, None)
        self._hear(node)

    def node_reported(
        self,
        node: NodeId,
        capacity_bytes: int,
        used_bytes: int,
        full: bool,
        replicas: Mapping[ReplicaId, ReplicaStatus],
        *,
        broken: Mapping[str, ReplicaId] = MappingProxyType({}),
    ) -> None:
        """A heartbeat with all that it holds."""
        for replica in replicas:
            self._created.pop(replica, None)
        if node in self._nodes:
            self._earlier[node] = self._nodes[node]
        self._nodes[node] = NodeWord(self._wall_ms(), self._clock(), capacity_bytes, used_bytes, full, replicas, broken)
        self._hear(node)

    def replica_created(self, replica: ReplicaId) -> None:
        """Its node has just said so; a heartbeat on its way may not know it yet."""
        self._created[replica] = self._clock()

    def is_new(self, replica: ReplicaId) -> bool:
        """Created so recently that a heartbeat without it tells nothing."""
        created = self._created.get(replica)
        return created is not None and self._clock() - created <= self._lease_s

    def node_removed(self, node: NodeId) -> None:
        """The catalog has it no more."""
        self._nodes.pop(node, None)
        self._earlier.pop(node, None)
        self._heard.pop(node, None)

    def front_end_registered(self, front_end: FrontEndId) -> None:
        """A new instance, which has nothing open."""
        self._front_ends[front_end] = FrontEndWord(self._wall_ms())
        self._hear(front_end)

    def front_end_reported(
        self, front_end: FrontEndId, volumes: Mapping[VolumeId, VolumeReport], *, shows_snapshots: bool = False
    ) -> None:
        """A heartbeat with all that it has open or opens."""
        self._front_ends[front_end] = FrontEndWord(self._wall_ms(), volumes, shows_snapshots)
        self._hear(front_end)

    def snapshots_read(self, snapshots: Iterable[SnapshotId]) -> None:
        """A front-end has clients that read these, or is about to."""
        now = self._clock()
        self._read.update(dict.fromkeys(snapshots, now))

    def read_now(self) -> frozenset[SnapshotId]:
        """The snapshots that front-ends named within a lease: what these need is kept.

        Right after a start of control not all have been heard (`settling_s`).
        """
        oldest = self._clock() - self._lease_s
        self._read = {snapshot: at for snapshot, at in self._read.items() if at >= oldest}
        return frozenset(self._read)

    def daemon_starting(self, daemon: DaemonId, why: str) -> None:
        """It asks for the cluster's name, and cannot register yet. Its lease does not hold for that."""
        now, before = self._clock(), self._starting.get(daemon)
        # A word without a reason, as the first one of each start is, takes no reason back.
        self._starting[daemon] = Starting(before.since, now, why or before.why) if before else Starting(now, now, why)

    def daemon_registered(self, daemon: DaemonId) -> None:
        """A new instance, which ships nothing yet."""
        self._starting.pop(daemon, None)
        self._daemons[daemon] = DaemonWord(self._wall_ms())
        self._hear(daemon)

    def daemon_reported(self, daemon: DaemonId, snapshots: Mapping[SnapshotId, ShipProgress], why: str) -> None:
        """A heartbeat with all that it ships. why: what keeps it from writing to its store; empty: nothing."""
        self._daemons[daemon] = DaemonWord(self._wall_ms(), snapshots, why)
        self._hear(daemon)

    def daemon_removed(self, daemon: DaemonId) -> None:
        """Nobody waits for it any more."""
        self._starting.pop(daemon, None)
        self._daemons.pop(daemon, None)
        self._heard.pop(daemon, None)

    def may_be_up(self, process: NodeId | FrontEndId | DaemonId) -> bool:
        """Its lease holds, or it was not heard and control has just started."""
        return self.is_up(process) or (process not in self._heard and bool(self.settling_s()))

    def is_up(self, process: NodeId | FrontEndId | DaemonId) -> bool:
        """Its lease holds."""
        heard = self._heard.get(process)
        return heard is not None and self._clock() - heard <= self._lease_s

    def node(self, node: NodeId) -> NodeWord | None:
        """Its last word, None where it was not heard since control started."""
        return self._nodes.get(node)

    def replicas_up(self) -> dict[NodeId, Mapping[ReplicaId, ReplicaStatus]]:
        """What the nodes whose lease holds said of their replicas."""
        return {node: word.replicas for node, word in self._nodes.items() if word.replicas and self.is_up(node)}

    def node_before(self, node: NodeId, heard_at: float) -> NodeWord | None:
        """Its last word that is older than that time, of the two last ones."""
        words = (self._nodes.get(node), self._earlier.get(node))
        return next((word for word in words if word and word.heard_at < heard_at), None)

    def front_end(self, front_end: FrontEndId) -> FrontEndWord | None:
        """Its last word, None where it was not heard since control started."""
        return self._front_ends.get(front_end)

    def daemon(self, daemon: DaemonId) -> DaemonWord | None:
        """Its last word, None where it was not heard since control started."""
        return self._daemons.get(daemon)

    def starting(self) -> Mapping[DaemonId, Starting]:
        """The daemons that were started longer than a lease ago, and have not registered since."""
        now = self._clock()
        return {daemon: word for daemon, word in self._starting.items() if now - word.since > self._lease_s}

    def seconds_since(self, heard_at: float) -> float:
        """How long ago that was."""
        return self._clock() - heard_at

    def daemons_up(self) -> list[DaemonId]:
        """Those whose lease holds."""
        return [each for each in self._daemons if self.is_up(each)]

    def shipped_now(self) -> list[Mapping[SnapshotId, ShipProgress]]:
        """What each daemon that is up said that it ships."""
        return [self._daemons[each].snapshots for each in self.daemons_up()]

    def silent_s(self, process: NodeId | FrontEndId | DaemonId) -> float:
        """Seconds since it was heard, or since control started."""
        return self._clock() - self._heard.get(process, self.started_at)

    def settling_s(self) -> float:
        """How much longer processes that are up may not have been heard yet, because control has just started."""
        return max(0.0, self.started_at + self._lease_s - self._clock())

    async def hears(self, process: NodeId | FrontEndId | DaemonId) -> bool:
        """Whether it is up: not denied before control has run for as long as a process may be silent."""
        while not self.is_up(process) and (settling_s := self.settling_s()):
            await self.next_beat(settling_s)
        return self.is_up(process)

    async def next_beat(self, timeout_s: float) -> None:
        """Until somebody is heard, `timeout_s` seconds at most."""
        waiting = asyncio.ensure_future(self._beat.wait())
        try:
            await asyncio.wait([waiting], timeout=timeout_s)
        finally:
            waiting.cancel()

    def _hear(self, process: str) -> None:
        self._heard[process] = self._clock()
        self._beat.set()
        self._beat = asyncio.Event()
