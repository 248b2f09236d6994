"""What is wrong with snapshots, restored volumes and the daemons of the object store.

Part of `cairn status` (blockstore/control/status.py); made afresh for each request, it changes nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from blockstore.control.hydration import NO_DAEMON
from blockstore.control.presence import Presence, Starting
from blockstore.control.records import Volume
from blockstore.control.shipping import users_by_source
from blockstore.control.snapshot_records import Snapshot, SnapshotState, StoreDaemon
from blockstore.domain import DaemonId, SnapshotId, VolumeState
from blockstore.rpc import control_pb2
from blockstore.rpc.control_pb2 import Problem

WARNING: Final = control_pb2.SEVERITY_WARNING
DEGRADED: Final = control_pb2.SEVERITY_DEGRADED
UNAVAILABLE: Final = control_pb2.SEVERITY_UNAVAILABLE

#: States in which a volume's replicas are all expected to be there.
AT_WORK: Final = (VolumeState.AVAILABLE, VolumeState.IN_USE)


class StoreObserver:
    """Sees snapshots and daemons as they were last heard of."""

    def __init__(self, presence: Presence, snapshots: Iterable[Snapshot], daemons: Iterable[StoreDaemon]) -> None:
        self._presence = presence
        self._snapshots = tuple(snapshots)
        self._daemons = tuple(daemons)

    def problems(self, volumes: Sequence[Volume], troubles: Sequence[str]) -> Iterator[Problem]:
        """troubles: of each volume, why its hydration stands still; empty where it goes on, or is paused."""
        served, sources = bool(self._presence.daemons_up()), users_by_source(volumes).keys()
        for snapshot in self._snapshots:
            yield from self._of_snapshot(snapshot, served, sources)
        for volume, trouble in zip(volumes, troubles, strict=True):
            if trouble and volume.state in AT_WORK:
                severity = DEGRADED if volume.attachment else WARNING
                message = f"its hydration stands still: {trouble}"
                yield Problem(severity=severity, subject=volume.id, message=message)
        yield from self._of_daemons(served, volumes)

    def _of_snapshot(self, snapshot: Snapshot, served: bool, sources: AbstractSet[SnapshotId]) -> Iterator[Problem]:
        if snapshot.state is SnapshotState.ERROR:
            advice = "retry or delete it" if snapshot.pinned else "delete it"
            yield Problem(severity=WARNING, subject=snapshot.id, message=f"in error: {snapshot.reason}; {advice}")
        elif snapshot.state is SnapshotState.PENDING and snapshot.sealed_at_ms and not served:
            yield Problem(severity=DEGRADED, subject=snapshot.id, message=f"not shipped yet: {NO_DAEMON}")
        elif snapshot.state is SnapshotState.DELETING and not served and snapshot.id not in sources:
            yield Problem(severity=WARNING, subject=snapshot.id, message=f"not deleted yet: {NO_DAEMON}")

    def _of_daemons(self, served: bool, volumes: Sequence[Volume]) -> Iterator[Problem]:
        needed = any(each.source for each in volumes) or any(
            each.state is SnapshotState.PENDING for each in self._snapshots
        )
        severity = DEGRADED if needed and not served else WARNING
        for daemon in self._daemons:
            if self._presence.is_up(daemon.id):
                said = self._presence.daemon(daemon.id)
                if said and said.why:
                    message = f"up, and writes nothing to the object store: {said.why}"
                    yield Problem(severity=DEGRADED if needed else WARNING, subject=daemon.id, message=message)
                continue
            message = f"down: last heard {self._presence.silent_s(daemon.id):.0f} s ago"
            if self._presence.daemon(daemon.id) is None:
                message = "down: not heard since control started"
            advice = f"start it, or `cairn store forget {daemon.id}` where it is gone for good"
            yield Problem(severity=severity, subject=daemon.id, message=f"{message}; {advice}")
        for starting, word in self._presence.starting().items():
            yield Problem(severity=severity, subject=starting, message=self._never_registered(starting, word))

    def _never_registered(self, daemon: DaemonId, word: Starting) -> str:
        since_s = self._presence.seconds_since(word.since)
        heard_s = self._presence.seconds_since(word.heard_at)
        why = f" ({word.why})" if word.why else ""
        return (
            f"started {since_s:.0f} s ago, last heard {heard_s:.0f} s ago, and not registered{why}: look at its log, "
            f"store and key; or stop it, and `cairn store forget {daemon}`"
        )
