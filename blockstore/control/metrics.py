"""The metrics of control: what `cairn status` shows, as numbers, and how the metastore does.

What is told of volumes, nodes and problems is that very status, judged at the same place. Only the active control has
it; of one that stands by there are the metastore's calls and `active`, which is 0. All is counted by state, so that
there are no more series for many volumes; who is concerned, `cairn status` says.

With 10,000 volumes a look at the catalog takes 2 s of CPU, as a `cairn status` does. Invariant: however many scrape,
one look runs at a time, none within KEPT_S after another, and all together take a twentieth of control's time at most.
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

#: A look is good for so long at least.
KEPT_S: Final = 5.0
#: After a look come so many times as long without one.
_PAUSES: Final = 20
#: How long a scrape waits for a look; Prometheus gives it 10 s in all.
_PATIENCE_S: Final = 5.0

ACTIVE = gauge("control_active", "1 for the active control, 0 for one that stands by.")
STORE_CALLS = histogram("metastore_call", "What calls of the metastore took, also those that failed.", "operation")
STORE_ERRORS = counter("metastore_errors", "Calls of the metastore that failed.", "operation")
LOOK = gauge("control_look_seconds", "What it took to look at the catalog for the metrics below.")
LOOK_AGE = gauge("control_look_age_seconds", "How long ago that was; a look that takes long is good for longer.")
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
    ACTIVE, STORE_CALLS, STORE_ERRORS, LOOK, LOOK_AGE, CONTROLS, HEALTHY, PROBLEMS, VOLUMES, HEALTH, SERVED, REPLICAS,
    REPAIRS, REPAIRS_WAITING, SNAPSHOTS, FRONT_ENDS, STORE_DAEMONS, NODE_UP, NODE_FULL, NODE_DRAINING, NODE_CAPACITY,
    NODE_USED, NODE_REPLICAS,
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
    """Of one process."""

    def __init__(self) -> None:
        self.calls = StoreCalls()
        self._service: ControlService | None = None
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = 0.0
        self._took_s = 0.0
        self._seen: list[Sample] = []
        """Of the last look of this time as the active one; empty before it."""

    def become_active(self, service: ControlService) -> None:
        """From now on there is a cluster to be told of."""
        self._service = service

    async def stand_by(self) -> None:
        """There is none any more, nor a metastore to ask."""
        self._service, self._seen, self._took_s = None, [], 0.0
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def samples(self) -> list[Sample]:
        """A picture of now."""
        if self._service is not None:
            await self._look_if_due(self._service)
        return [ACTIVE(self._service is not None), *_of_store(self.calls), *self._of_look()]

    def _of_look(self) -> list[Sample]:
        return [*self._seen, LOOK(self._took_s), LOOK_AGE(_now() - self._looked_at)] if self._seen else []

    async def _look_if_due(self, service: ControlService) -> None:
        """Wait for a look, but not for long: then what was seen last has to do."""
        due = not self._seen or _now() >= self._looked_at + max(KEPT_S, _PAUSES * self._took_s)
        if self._looking is None and due:
            self._looking = asyncio.get_running_loop().create_task(self._look(service))
        looking = self._looking
        if looking is None:
            return
        await asyncio.wait({looking}, timeout=_PATIENCE_S)
        if looking.done() and self._looking is looking:
            self._looking = None
            looking.result()

    async def _look(self, service: ControlService) -> None:
        began = _now()
        try:
            self._seen = await _of_cluster(service)
        except QuorumUnavailable as error:  # nothing is told then, and no 0 of anything
            _log.warning("no metrics of the cluster: the metastore does not answer", error=str(error))
            self._seen = []
        self._looked_at = _now()
        self._took_s = self._looked_at - began


def _now() -> float:
    return asyncio.get_running_loop().time()


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
