"""The metrics of control: what `cairn status` shows, as numbers, and how the metastore does.

What is told of volumes, nodes and problems is that very status, judged at the same place. Only the active control has
it; of one that stands by there are the metastore's calls and `active`, which is 0. All is counted by state, so that
there are no more series for many volumes; who is concerned, `cairn status` says.

Invariant: a scrape looks at the catalog at most once in KEPT_S, however many there are: with 10,000 volumes a look
takes control as long as a `cairn status` does.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

import structlog

from blockstore.control.messages import VOLUME_STATES
from blockstore.control.metastore.measured import StoreCalls
from blockstore.control.service import ControlService
from blockstore.control.snapshot_records import SnapshotState
from blockstore.control.status import CATCHING_UP, DAMAGED, DOWN, FILLING, UNKNOWN, UP
from blockstore.errors import QuorumUnavailable
from blockstore.metrics import Sample, counter, gauge, histogram
from blockstore.rpc import control_pb2 as pb

_log = structlog.get_logger(__name__)

#: A look is good for so long.
KEPT_S: Final = 5.0

ACTIVE = gauge("control_active", "1 for the active control, 0 for one that stands by.")
STORE_CALLS = histogram("metastore_call", "What calls of the metastore took, also those that failed.", "operation")
STORE_ERRORS = counter("metastore_errors", "Calls of the metastore that failed.", "operation")
LOOK = gauge("control_status_seconds", "What it took to look at the catalog for these metrics.")
CONTROLS = gauge("controls", "Control processes by state: active, standing-by.", "state")

HEALTHY = gauge("healthy", "1 while nothing is degraded or unavailable, as `cairn status` says.")
PROBLEMS = gauge("problems", "Problems that `cairn status` shows, by severity.", "severity")
VOLUMES = gauge("volumes", "Volumes by state.", "state")
HEALTH = gauge("volumes_by_health", "Volumes by the worst that `cairn status` says of them.", "health")
SERVED = gauge("volumes_attached", "Attached volumes, by what their front-ends say of them.", "serving")
REPLICAS = gauge("volume_replicas", "Replicas of all volumes, by state.", "state")
REPAIRS = gauge("repairs_under_way", "Replicas that are filled on other nodes, to take a member's place.")
REPAIRS_WAITING = gauge("repairs_waiting", "Replicas that should be elsewhere, and cannot be moved for now.")
SNAPSHOTS = gauge("snapshots", "Snapshots by state.", "state")
FRONT_ENDS = gauge("front_ends", "Front-ends that are up, and that are down with volumes attached.", "state")
STORE_DAEMONS = gauge("snapshotds_up", "Daemons of the object store that are up.")
NODE_UP = gauge("node_up", "1 while the node is heard.", "node", "zone")
NODE_FULL = gauge("node_full", "1 while the node takes no writes for want of room.", "node", "zone")
NODE_DRAINING = gauge("node_draining", "1 while the node is emptied.", "node", "zone")
NODE_CAPACITY = gauge("node_capacity_bytes", "The size of the node's file system.", "node", "zone")
NODE_USED = gauge("node_used_bytes", "What of it is in use.", "node", "zone")
NODE_REPLICAS = gauge("node_replicas", "Replicas that are placed on the node.", "node", "zone")

METRICS: Final = (
    ACTIVE, STORE_CALLS, STORE_ERRORS, LOOK, CONTROLS, HEALTHY, PROBLEMS, VOLUMES, HEALTH, SERVED, REPLICAS, REPAIRS,
    REPAIRS_WAITING, SNAPSHOTS, FRONT_ENDS, STORE_DAEMONS, NODE_UP, NODE_FULL, NODE_DRAINING, NODE_CAPACITY, NODE_USED,
    NODE_REPLICAS,
)  # fmt: skip

_SEVERITIES: Final = {
    pb.SEVERITY_WARNING: "warning",
    pb.SEVERITY_DEGRADED: "degraded",
    pb.SEVERITY_UNAVAILABLE: "unavailable",
}
_HEALTHY: Final = "healthy"
_VOLUME_STATES: Final = {number: state.value for state, number in VOLUME_STATES.items()}
_REPLICA_STATES: Final = (UP, CATCHING_UP, DAMAGED, FILLING, DOWN, UNKNOWN)
_SERVING: Final = ("serving", "opening", "failed")
_UNHEARD: Final = "unknown"


class ControlMetrics:
    """Of one process. service: of control while it is active, else None; whoever makes it sets it."""

    def __init__(self) -> None:
        self.calls = StoreCalls()
        self.service: ControlService | None = None
        self._looked_at = -KEPT_S
        self._seen: list[Sample] = []
        self._of: ControlService | None = None
        self._turn = asyncio.Lock()

    async def samples(self) -> list[Sample]:
        """A picture of now."""
        active = self.service
        seen = await self._look(active) if active is not None else []
        return [ACTIVE(self.service is not None), *_of_store(self.calls), *seen]

    async def _look(self, service: ControlService) -> list[Sample]:
        """Nothing where the metastore does not answer: an error, and no 0 of anything."""
        clock = asyncio.get_running_loop().time
        async with self._turn:
            if self._of is service and clock() < self._looked_at + KEPT_S:
                return self._seen
            began = clock()
            try:
                found = await _of_cluster(service)
            except QuorumUnavailable as error:
                _log.warning("no metrics of the cluster: the metastore does not answer", error=str(error))
                return []
            self._of, self._looked_at = service, clock()
            self._seen = [LOOK(self._looked_at - began), *found]
        return self._seen


def _of_store(calls: StoreCalls) -> Iterator[Sample]:
    for operation, durations in calls.durations.items():
        yield STORE_CALLS(durations, operation)
        yield STORE_ERRORS(calls.errors[operation], operation)


async def _of_cluster(service: ControlService) -> list[Sample]:
    seen = pb.StatusResponse()
    counts = _VolumeCounts()
    async for part in service.Status(pb.StatusRequest(), None):
        counts.add(part.volumes)
        del part.volumes[:]
        seen.MergeFrom(part)
        await asyncio.sleep(0)  # a part has some hundred volumes: what nodes and front-ends say comes between two
    snapshots = Counter(each.state for each in await service.snapshots())
    return [
        HEALTHY(seen.healthy),
        *_of_problems(seen.problems, counts),
        *counts.samples(),
        *(SNAPSHOTS(snapshots[state], state.value) for state in SnapshotState),
        *_of_processes(seen),
        STORE_DAEMONS(service.store_daemons_up),
        *_of_nodes(seen.nodes),
    ]


class _VolumeCounts:
    """What is counted of volumes, which may be too many to be kept."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self._states: Counter[str] = Counter()
        self._serving: Counter[str] = Counter()
        self._replicas: Counter[str] = Counter()
        self._newcomers = self._waiting = 0

    def add(self, volumes: Iterable[pb.VolumeHealth]) -> None:
        for each in volumes:
            self.ids.add(each.volume.id)
            self._states[_VOLUME_STATES[each.volume.state]] += 1
            if each.volume.HasField("attachment"):
                self._serving[each.serving or _UNHEARD] += 1
            for replica in each.replicas:
                self._replicas[replica.state] += 1
                self._newcomers += bool(replica.replaces)
                self._waiting += bool(replica.waits)

    def samples(self) -> Iterator[Sample]:
        for state in _VOLUME_STATES.values():
            yield VOLUMES(self._states[state], state)
        for serving in (*_SERVING, _UNHEARD):
            yield SERVED(self._serving[serving], serving)
        for state in _REPLICA_STATES:
            yield REPLICAS(self._replicas[state], state)
        yield REPAIRS(self._newcomers)
        yield REPAIRS_WAITING(self._waiting)


def _of_problems(problems: Iterable[pb.Problem], counts: _VolumeCounts) -> Iterator[Sample]:
    severities: Counter[int] = Counter()
    worst: dict[str, int] = {}
    for each in problems:
        severities[each.severity] += 1
        if each.subject in counts.ids:
            worst[each.subject] = max(each.severity, worst.get(each.subject, each.severity))
    health = Counter(worst.values())
    yield HEALTH(len(counts.ids) - len(worst), _HEALTHY)
    for severity, name in _SEVERITIES.items():
        yield PROBLEMS(severities[severity], name)
        yield HEALTH(health[severity], name)


def _of_processes(seen: pb.StatusResponse) -> Iterator[Sample]:
    yield FRONT_ENDS(sum(each.up for each in seen.front_ends), "up")
    yield FRONT_ENDS(sum(not each.up and each.volumes > 0 for each in seen.front_ends), "down")
    active = sum(each.active for each in seen.controls)
    yield CONTROLS(active, "active")
    yield CONTROLS(len(seen.controls) - active, "standing-by")


def _of_nodes(nodes: Iterable[pb.Node]) -> Iterator[Sample]:
    for each in nodes:
        labels = each.id, each.zone
        yield NODE_UP(each.up, *labels)
        yield NODE_FULL(each.full, *labels)
        yield NODE_DRAINING(each.draining, *labels)
        yield NODE_CAPACITY(each.capacity_bytes, *labels)
        yield NODE_USED(each.used_bytes, *labels)
        yield NODE_REPLICAS(each.replicas, *labels)
