"""What the cluster looks like: each replica's health, and every problem with its reason.

Made afresh for each request from the catalog and the last words of nodes and front-ends; it changes
nothing. A front-end's word on a replica counts before the node's: it sees acks. A node's word tells
of detached volumes. Where neither was heard, the answer is `unknown`, never a guess.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

from blockstore.control.catalog import growing_on, replicas_by_node, tombstones_of, volumes_by_front_end
from blockstore.control.lag import lag_records
from blockstore.control.messages import Messages
from blockstore.control.presence import Presence
from blockstore.control.rebuilds import Rebuilds
from blockstore.control.records import AttachmentState, FrontEnd, Node, Segment, Tombstone, Volume
from blockstore.control.scrubbing import scrub_problems
from blockstore.control.snapshot_status import AT_WORK, DEGRADED, UNAVAILABLE, WARNING, StoreObserver
from blockstore.domain import FrontEndId, Member, NodeId, ReplicaId, VolumeId, VolumeState
from blockstore.grpc_parts import in_parts
from blockstore.rpc import control_pb2
from blockstore.rpc.control_pb2 import Problem, ReplicaHealth, VolumeHealth, VolumeReport
from blockstore.rpc.replica_pb2 import ReplicaStatus

UP: Final = "up"
CATCHING_UP: Final = "catching-up"
DAMAGED: Final = "damaged"
FILLING: Final = "filling"
DOWN: Final = "down"
UNKNOWN: Final = "unknown"

_SERVING: Final = {
    control_pb2.SERVING_STATE_OPENING: "opening",
    control_pb2.SERVING_STATE_SERVING: "serving",
    control_pb2.SERVING_STATE_FAILED: "failed",
    control_pb2.SERVING_STATE_FENCED: "failed",
    control_pb2.SERVING_STATE_LOST: "failed",
}


class Observer:
    """Sees the cluster as it was last heard of."""

    def __init__(
        self,
        messages: Messages,
        presence: Presence,
        nodes: Mapping[NodeId, Node],
        front_ends: Mapping[FrontEndId, FrontEnd],
        store: StoreObserver,
        *,
        rebuilds: Rebuilds,
        draining: Collection[NodeId],
        waits: Mapping[ReplicaId, str],
        maintenance_trouble: Callable[[VolumeId], str],
    ) -> None:
        """waits: what keeps replicas from moving. maintenance_trouble: why a volume was not opened for maintenance."""
        self._messages = messages
        self._presence = presence
        self._nodes = nodes
        self._front_ends = front_ends
        self._store = store
        self._rebuilds = rebuilds
        self._draining = draining
        self._waits = waits
        self._maintenance_trouble = maintenance_trouble

    def status(
        self, volumes: tuple[Volume, ...], tombstones: Iterable[Tombstone]
    ) -> Iterator[control_pb2.StatusResponse]:
        """All of it, in parts; the worst problems first."""
        problems: list[Problem] = []

        def health() -> Iterator[VolumeHealth]:
            for volume in volumes:
                seen = self.volume(volume)
                problems.extend(self._of(volume, seen))
                yield seen

        yield from in_parts(control_pb2.StatusResponse(), volumes=health())
        replicas, attached = replicas_by_node(volumes), volumes_by_front_end(volumes)
        problems += self._node_problems(volumes, tombstones, replicas)
        problems += self._front_end_problems(attached)
        problems += self._store.problems(volumes, [self._messages.hydration_trouble(each) for each in volumes])
        problems.sort(key=lambda problem: (-problem.severity, problem.subject))
        yield from in_parts(
            control_pb2.StatusResponse(healthy=all(problem.severity == WARNING for problem in problems)),
            problems=problems,
            nodes=(self._messages.node(each, replicas, self._draining) for each in self._nodes.values()),
            front_ends=(self._messages.front_end(each, attached) for each in self._front_ends.values()),
        )

    def volume(self, volume: Volume) -> VolumeHealth:
        """One volume with its replicas."""
        report = self._report(volume)
        replicas = []
        for segment in volume.segments:
            replicas += [self._replica(volume, segment, member, report) for member in segment.configuration.members]
            if change := segment.configuration.replacement:
                newcomer = self._replica(volume, segment, change.newcomer, report)
                newcomer.replaces, newcomer.replaces_why = change.replaces, change.reason
                replicas.append(newcomer)
        return VolumeHealth(
            volume=self._messages.volume(volume),
            replicas=replicas,
            serving=_SERVING.get(report.state, "") if report else "",
            clients=report.clients if report else 0,
        )

    # ---- replicas

    def _report(self, volume: Volume) -> VolumeReport | None:
        """What the front-end says of the volume in its present epoch."""
        if volume.attachment is None or not self._presence.is_up(volume.attachment.front_end):
            return None
        word = self._presence.front_end(volume.attachment.front_end)
        report = word.volumes.get(volume.id) if word else None
        return report if report and report.epoch == volume.attachment.epoch else None

    def _replica(self, volume: Volume, segment: Segment, member: Member, report: VolumeReport | None) -> ReplicaHealth:
        said = next((each for each in report.members if each.replica == member.replica), None) if report else None
        own = self._own_word(member)
        lag = said.lag_records if said else 0 if volume.attachment else lag_records(self._presence, segment, member)
        state, why = self._state(volume, member, said, lag)
        node = self._nodes.get(member.node)
        rebuild = self._rebuilds.of(member.replica)
        return ReplicaHealth(
            replica=member.replica,
            node=member.node,
            zone=node.zone if node else "",
            state=state,
            end=own.end if own else said.matched if said else None,
            lag_records=lag,
            extents_done=said.extents_done if said else 0,
            extents_total=said.extents_total if said else 0,
            file_bytes=own.file_bytes if own else 0,
            why=why,
            scrub=own.scrub if own else None,
            bad_blocks_found=own.corrupt_blocks_found if own else 0,
            bad_blocks_repaired=own.corrupt_blocks_repaired if own else 0,
            damage=own.damage if own else "",
            seconds_left=rebuild.seconds_left,
            rate_bytes=rebuild.rate_bytes,
            segment=segment.number,
            waits=self._waits.get(member.replica, ""),
        )

    def _state(
        self, volume: Volume, member: Member, said: control_pb2.MemberReport | None, lag: int
    ) -> tuple[str, str]:
        """The state's name, and why it is not `up`."""
        if volume.state is VolumeState.CREATING:
            return UNKNOWN, "it is being created"
        if absence := self._absence(member):
            return absence
        own = self._own_word(member)
        if own is None and not self._presence.is_new(member.replica):
            word = self._presence.node(member.node)
            if word and member.replica in word.broken.values():
                return DOWN, "its node can make nothing of what is left of it"
            return DOWN, "its node is up and does not have it: has its disk been emptied?"
        return _condition(said, own, lag, self._comes(volume))

    def _comes(self, volume: Volume) -> str:
        """When a detached volume's replica that is behind gets what it lacks."""
        if volume.maintenance:
            return f"front-end {volume.maintenance.front_end} brings it up to date"
        if volume.state is not VolumeState.AVAILABLE:
            return "it gets them once the volume can be attached"
        if trouble := self._maintenance_trouble(volume.id):
            return f"it is tried again, as the last time failed: {trouble}"
        return "a front-end brings it up to date as soon as one can open the volume"

    def _absence(self, member: Member) -> tuple[str, str] | None:
        """Why nothing is known from its node now."""
        word = self._presence.node(member.node)
        if word is None:
            return UNKNOWN, "its node was not heard since control started"
        if not self._presence.is_up(member.node):
            return DOWN, f"its node was last heard {self._presence.silent_s(member.node):.0f} s ago"
        return (UNKNOWN, "its node has not reported its replicas yet") if word.replicas is None else None

    def _own_word(self, member: Member) -> ReplicaStatus | None:
        word = self._presence.node(member.node)
        return word.replicas.get(member.replica) if word and word.replicas else None

    # ---- problems

    def _of(self, volume: Volume, health: VolumeHealth) -> Iterator[Problem]:
        for warning in health.volume.warnings:
            yield Problem(severity=WARNING, subject=volume.id, message=warning)
        if volume.state is VolumeState.ERROR:
            yield Problem(severity=UNAVAILABLE, subject=volume.id, message=f"in error: {volume.reason}")
        elif volume.reason:
            yield Problem(severity=WARNING, subject=volume.id, message=volume.reason)
        yield from self._growth_problems(volume)
        if volume.state in AT_WORK:
            yield from _replica_problems(volume, health.replicas)
            yield from self._waiting(volume, health.replicas)
        if volume.attachment:
            yield from self._serving_problems(volume, volume.attachment.front_end)

    def _growth_problems(self, volume: Volume) -> Iterator[Problem]:
        """What keeps a resize from its end."""
        down = sorted(node for node in growing_on(volume) if not self._presence.is_up(node))
        if volume.growing and down:
            message = f"it cannot be enlarged to {volume.growing.size_bytes} bytes yet: node {down[0]} is down"
            yield Problem(severity=WARNING, subject=volume.id, message=message)

    @staticmethod
    def _waiting(volume: Volume, replicas: Iterable[ReplicaHealth]) -> Iterator[Problem]:
        """Replicas that should be elsewhere, and what stands in the way."""
        for each in replicas:
            if each.waits:
                message = f"replica {each.replica} on {each.node} cannot be moved to another node: {each.waits}"
                yield Problem(severity=WARNING, subject=volume.id, message=message)

    def _serving_problems(self, volume: Volume, front_end: FrontEndId) -> Iterator[Problem]:
        assert volume.attachment is not None
        closing = volume.attachment.state is AttachmentState.DETACHING
        if not self._presence.is_up(front_end):
            message = f"front-end {front_end} is down" + (
                "; detach with --force to go on without it" if closing else ""
            )
            yield Problem(severity=WARNING if closing else UNAVAILABLE, subject=volume.id, message=message)
            return
        if volume.attachment.state is not AttachmentState.ATTACHED:
            return
        report = self._report(volume)
        if report is None or report.state != control_pb2.SERVING_STATE_SERVING:
            doing = _SERVING.get(report.state, "not known") if report else "not opened yet"
            why = f": {report.why}" if report and report.why else ""
            yield Problem(
                severity=UNAVAILABLE,
                subject=volume.id,
                message=f"front-end {front_end} does not serve it ({doing}){why}",
            )
        elif report.lacks_room:
            message = (
                f"too few of its nodes have room, so writes to it wait or fail with ENOSPC ({report.lacks_room}): "
                "free space on the full ones, or bring back those that are away"
            )
            yield Problem(severity=UNAVAILABLE, subject=volume.id, message=message)

    def _node_problems(
        self, volumes: tuple[Volume, ...], tombstones: Iterable[Tombstone], replicas: Mapping[NodeId, int]
    ) -> Iterator[Problem]:
        expected = {each.replica for volume in volumes for each in tombstones_of(volume)}
        expected |= {each.replica for each in tombstones}
        for node in self._nodes.values():
            if not self._presence.is_up(node.id):
                message = f"down: last heard {self._presence.silent_s(node.id):.0f} s ago"
                if self._presence.node(node.id) is None:
                    message = "down: not heard since control started"
                yield Problem(severity=DEGRADED if replicas.get(node.id) else WARNING, subject=node.id, message=message)
                continue
            word = self._presence.node(node.id)
            if word and word.full:
                message = f"full: free space on its disk, or move its replicas away (cairn node drain {node.id})"
                yield Problem(severity=DEGRADED, subject=node.id, message=message)
            if word and word.replicas:
                yield from _held_problems(node.id, word.replicas, expected)
            if word:
                yield from _broken_problems(node.id, word.broken, expected)

    def _front_end_problems(self, attached: Mapping[FrontEndId, int]) -> Iterator[Problem]:
        for front_end in self._front_ends.values():
            count = attached.get(front_end.id, 0)
            if count and not self._presence.is_up(front_end.id):
                yield Problem(
                    severity=UNAVAILABLE, subject=front_end.id, message=f"down, with {count} volumes attached"
                )


def _condition(
    said: control_pb2.MemberReport | None, own: ReplicaStatus | None, lag: int, comes: str
) -> tuple[str, str]:
    """The state of a replica that is there, and why it is not `up`.

    said: by the front-end; own: by its node, None of one so new that its node has not named it yet. comes: when one
    that nobody serves gets the records that it lacks.
    """
    if said and not said.connected:
        return DOWN, said.degraded_why or "the front-end cannot reach it"
    if not (said.whole if said else own is None or own.whole):
        return FILLING, (said.degraded_why if said else "") or "it is being copied to, and counts for nothing yet"
    if (said and said.damaged) or (own and own.damage):
        what = own.damage if own and own.damage else "it has lost content"
        return DAMAGED, f"{what}; it is filled anew once a quorum of the others is whole and sound"
    if said and said.degraded_why:
        return CATCHING_UP, said.degraded_why
    if lag and not said:
        return CATCHING_UP, f"it lacks {lag} records; {comes}"
    return UP, ""


def _replica_problems(volume: Volume, replicas: Iterable[ReplicaHealth]) -> Iterator[Problem]:
    seen = [each for each in replicas if not each.replaces]  # a newcomer is no trouble, and counts for nothing
    for segment in volume.segments:
        whole_here = [each.state in (UP, CATCHING_UP, DAMAGED) for each in seen if each.segment == segment.number]
        quorum, whole = len(whole_here) // 2 + 1, sum(whole_here)
        if whole < quorum:
            which = f" segment {segment.number}" if len(volume.segments) > 1 else " it"
            message = f"{whole} of {len(whole_here)} replicas can serve{which}, and it takes {quorum}"
            yield Problem(severity=UNAVAILABLE, subject=volume.id, message=message)
    for each in seen:
        if each.state != UP:
            message = f"replica {each.replica} on {each.node} ({each.zone}) is {each.state}: {each.why}"
            yield Problem(severity=DEGRADED, subject=volume.id, message=message)


def _broken_problems(
    node: NodeId, broken: Mapping[str, ReplicaId], expected: Collection[ReplicaId]
) -> Iterator[Problem]:
    """What people are to do with what is left of replicas: nobody else removes it."""
    for place, replica in sorted(broken.items()):
        what = (
            f"neither the tables of replica {replica} nor whose they are can be read; what is left of it is in {place}"
        )
        to_do = (
            "another replica takes its place; keep this until the volume is healthy, then remove it"
            if replica in expected
            else "no volume has that replica any more: remove it"
        )
        yield Problem(severity=WARNING, subject=node, message=f"{what}: {to_do}")


def _held_problems(
    node: NodeId, replicas: Mapping[ReplicaId, ReplicaStatus], expected: set[ReplicaId]
) -> Iterator[Problem]:
    for replica, status in sorted(replicas.items()):
        bad = status.corrupt_blocks_found - status.corrupt_blocks_repaired
        if bad > 0:
            message = f"{bad} bad blocks of replica {replica} have no good copy to be repaired from"
            yield Problem(severity=DEGRADED, subject=node, message=message)
        if status.damage:
            message = f"replica {replica} has damaged tables: {status.damage}"
            yield Problem(severity=DEGRADED, subject=node, message=message)
        yield from scrub_problems(node, status, DEGRADED)
        if replica not in expected:
            message = f"replica {replica} of {status.target.volume} is not in the catalog; it is left alone"
            yield Problem(severity=WARNING, subject=node, message=message)
