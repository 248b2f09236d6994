"""Fixing the content of new snapshots: one volume's by a seal, several volumes' behind a barrier.

    entered ── its volume is served (attached, or opened for maintenance) ── SealVolume ──> sealed
    several ── HoldWrites at all ── SealVolume at all ── ReleaseWrites at all, each held ──> all sealed

Several are snapshots of several volumes, or one of a volume of several segments: no one record fixes those.

A single seal is tried again until it is known to be done, always as one that may have been done
before: a control process that was killed in the middle finds the first one's generation. A barrier is
tried once, because its instant is over when anything failed; one that control was killed in is in
error. Invariants: releases are sent whatever failed, and a front-end releases by itself in time; an
error leaves a pin to be taken away wherever a seal may have been made (design, section 3, rule 8).
"""

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from blockstore.control import snapshot_transitions, transitions
from blockstore.control.catalog import Catalog
from blockstore.control.clock import now_ms
from blockstore.control.maintenance import subject_of
from blockstore.control.messages import to_position
from blockstore.control.peers import Peers
from blockstore.control.presence import Presence
from blockstore.control.reconcile import MOVED_ON, Reconciler
from blockstore.control.records import FrontEnd, Volume
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_records import Pin, Seal, Snapshot
from blockstore.control.snapshot_transitions import Phase, phase_of
from blockstore.control.transitions import place_of
from blockstore.domain import SnapshotId, VolumeId
from blockstore.errors import CairnError, Conflict, Fenced, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2
from blockstore.units import Epoch

_log = structlog.get_logger(__name__)

#: What a front-end answers where the volume has moved or its members are away: another try may succeed.
_MAY_PASS: Final = (QuorumUnavailable, NotFound, Fenced)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Part:
    """One snapshot of a barrier, and where its volume is served."""

    snapshot: Snapshot
    front_end: FrontEnd
    volume: VolumeId
    epoch: Epoch


class Sealing:
    """The snapshots that are not sealed yet."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: SnapshotCatalog,
        presence: Presence,
        peers: Peers,
        reconciler: Reconciler,
        *,
        seal_limit_s: float,
        hold_limit_s: float,
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._peers = peers
        self._reconciler = reconciler
        self._seal_limit_s = seal_limit_s
        self._hold_limit_s = hold_limit_s
        self._untried: set[SnapshotId] = set()
        """Entered by this process, and no seal was sent yet."""
        self._barriers: set[str] = set()
        """Begun by this process."""
        self._since: dict[str, float] = {}
        self._turn = asyncio.Lock()
        """Barriers one after the other: two that share volumes would break each other."""

    def expect(self, snapshots: Iterable[Snapshot]) -> None:
        """These are about to be entered in the catalog."""
        for each in snapshots:
            self._untried.add(each.id)
            self._barriers.add(each.barrier)

    def forget(self, snapshots: Iterable[Snapshot]) -> None:
        """They were not entered, or are sealed or in error."""
        for each in snapshots:
            self._untried.discard(each.id)
            self._barriers.discard(each.barrier)

    async def wait(self, snapshots: Sequence[SnapshotId]) -> tuple[Snapshot, ...]:
        """The snapshots once each is sealed or in error. Raises NotFound where one is gone."""
        while True:
            changed = self._snapshots.next_change()
            found = [await self._snapshots.snapshot(each) for each in snapshots]
            if all(phase_of(each) is not Phase.SEALING for each in found):
                return tuple(found)
            await changed.wait()

    async def reconcile(self, volumes: tuple[Volume, ...]) -> None:
        """Start or give up what is to be sealed."""
        groups: dict[str, list[Snapshot]] = {}
        for snapshot in await self._snapshots.unfinished():
            if phase_of(snapshot) is Phase.SEALING:
                groups.setdefault(snapshot.barrier or snapshot.id, []).append(snapshot)
        self._forget_others(groups)
        by_id = {volume.id: volume for volume in volumes}
        for name, group in groups.items():
            # One that is so new that its volume was listed before it has its turn in the next pass.
            if not self._reconciler.steps.running(("seal", name)) and all(each.volume in by_id for each in group):
                await self._look_at(name, group, by_id)

    async def _look_at(self, name: str, group: list[Snapshot], volumes: Mapping[VolumeId, Volume]) -> None:
        start = self._reconciler.steps.start
        if group[0].barrier and group[0].barrier not in self._barriers:
            start(("seal", name), name, lambda: self._give_up_interrupted(group))
        elif reason := self._hopeless(name, group, volumes):
            await self._fail(group, reason)
        elif all(place_of(volumes[each.volume]) for each in group):
            start(("seal", name), name, lambda: self._barrier(group) if group[0].barrier else self._seal_one(group[0]))

    def _hopeless(self, name: str, group: list[Snapshot], volumes: Mapping[VolumeId, Volume]) -> str:
        """Why it will not be sealed; empty while it may."""
        for each in group:
            try:
                transitions.check_snapshot(volumes[each.volume])
            except Conflict as error:
                return str(error)
        now = asyncio.get_running_loop().time()
        if now - self._since.setdefault(name, now) <= self._seal_limit_s:
            return ""
        return f"it could not be sealed within {self._seal_limit_s:.0f} s: {self.why(group)}; create it again"

    def why(self, group: Sequence[Snapshot]) -> str:
        """What stood in the way of sealing these the last time."""
        subjects = [group[0].barrier or group[0].id, *(subject_of(each.volume) for each in group)]
        known = (self._reconciler.steps.why(subject) for subject in subjects)
        return next(filter(None, known), "its volume is not served yet")

    def _forget_others(self, groups: Mapping[str, list[Snapshot]]) -> None:
        for name in self._since.keys() - groups.keys():
            del self._since[name]
            self._reconciler.steps.forget(name)

    # ---- one volume

    async def _seal_one(self, snapshot: Snapshot) -> None:
        if not await self._is_sealing([snapshot]):
            return
        (part,) = await self._parts([snapshot])
        try:
            answer = await self._seal(part)
        except _MAY_PASS:
            raise
        except CairnError as error:
            await self._fail([snapshot], f"it could not be sealed: {error}")
            return
        await self._sealed([snapshot], [answer], [answer.took_us])

    # ---- several at one instant

    async def _barrier(self, group: list[Snapshot]) -> None:
        async with self._turn:
            if not await self._is_sealing(group):
                return
            parts = await self._parts(group)
            began = asyncio.get_running_loop().time()
            answers: list[control_pb2.SealVolumeResponse] = []
            _, error = await _all(self._hold(part) for part in parts)
            if error is None:
                answers, error = await _all(self._seal(part) for part in parts)
            held, not_released = await _all(self._release(part) for part in parts)
            pause_us = int((asyncio.get_running_loop().time() - began) * 1e6)
        if failure := error or not_released:
            await self._fail(group, f"the volumes could not be sealed at one instant: {failure}; create it again")
        elif not all(held):
            loose = next(part.volume for part, kept in zip(parts, held, strict=True) if not kept)
            await self._fail(group, f"writes of volume {loose} went on before all volumes were sealed; create it again")
        else:
            await self._sealed(group, answers, [pause_us] * len(group))

    async def _hold(self, part: _Part) -> None:
        limit_s = self._hold_limit_s
        await self._peers.hold_writes(part.front_end, part.volume, part.epoch, part.snapshot.barrier, limit_s)

    async def _release(self, part: _Part) -> bool:
        return await self._peers.release_writes(part.front_end, part.volume, part.epoch, part.snapshot.barrier)

    async def _give_up_interrupted(self, group: list[Snapshot]) -> None:
        """Control was killed between the first hold and the last release. The instant is over."""
        if not await self._is_sealing(group):
            return
        served = [each for each in group if place_of(await self._catalog.volume(each.volume))]
        _, error = await _all(self._release(part) for part in await self._parts(served))
        if error:
            _log.info("a front-end releases writes by itself", barrier=group[0].barrier, error=str(error))
        await self._fail(group, "control was restarted before all volumes were sealed; create it again")

    # ---- what both rest on

    async def _parts(self, group: Sequence[Snapshot]) -> list[_Part]:
        """Raises QuorumUnavailable where a volume is not served now."""
        parts = []
        for snapshot in group:
            volume = await self._catalog.volume(snapshot.volume)
            place = place_of(volume)
            if place is None:
                raise QuorumUnavailable(f"volume {volume.id} is not served now")
            front_end = await self._catalog.front_end(place.front_end)
            if not await self._presence.hears(front_end.id):
                raise QuorumUnavailable(f"front-end {front_end.id} is down, which has volume {volume.id}")
            parts.append(_Part(snapshot, front_end, volume.id, place.epoch))
        return parts

    async def _is_sealing(self, group: Sequence[Snapshot]) -> bool:
        """Whether that is so still: the list that named them may have been read before another step ended."""
        return all([phase_of(await self._snapshots.snapshot(each.id)) is Phase.SEALING for each in group])

    async def _seal(self, part: _Part) -> control_pb2.SealVolumeResponse:
        again = part.snapshot.id not in self._untried
        self._untried.discard(part.snapshot.id)
        return await self._peers.seal_volume(part.front_end, part.volume, part.epoch, part.snapshot.id, again=again)

    async def _sealed(
        self, group: Sequence[Snapshot], answers: Sequence[control_pb2.SealVolumeResponse], pauses_us: Sequence[int]
    ) -> None:
        sizes = [
            sealed_size(await self._catalog.volume(each.volume), answer)
            for each, answer in zip(group, answers, strict=True)
        ]
        found = zip(group, answers, sizes, pauses_us, strict=True)
        by_id = {each.id: (answer, size, pause) for each, answer, size, pause in found}

        def change(now: Snapshot) -> Snapshot:
            answer, size_bytes, pause_us = by_id[now.id]
            return snapshot_transitions.sealed(
                now,
                generation=answer.generation,
                position=to_position(answer.position),
                further=tuple(
                    Seal(each.generation, each.position.epoch, each.position.sequence) for each in answer.segments[1:]
                ),
                size_bytes=size_bytes,
                pause_us=pause_us,
                now_ms=now_ms(),
            )

        await self._snapshots.change([each.id for each in group], change)
        self.forget(group)
        _log.info("snapshots are sealed", snapshots=[each.id for each in group], pause_us=max(pauses_us))

    async def _fail(self, group: Sequence[Snapshot], reason: str) -> None:
        tried = [each for each in group if each.id not in self._untried]
        pins = [Pin(each.volume, each.id, 0) for each in tried]
        with suppress(*MOVED_ON):
            await self._snapshots.change(
                [each.id for each in group], lambda now: snapshot_transitions.given_up(now, reason), pins=pins
            )
            self.forget(group)
            _log.warning("snapshots could not be sealed", snapshots=[each.id for each in group], reason=reason)


def sealed_size(volume: Volume, answer: control_pb2.SealVolumeResponse) -> int:
    """Of the segments that were sealed: one that the volume got since is not in the snapshot."""
    return sum(each.size_bytes for each in volume.segments[: len(answer.segments) or 1])


async def _all(calls: Iterable[Awaitable[Result]]) -> tuple[list[Result], CairnError | None]:
    """All results, or the first error once every call has ended. What is no CairnError is raised."""
    outcomes: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, CairnError):
            raise outcome
    first = next((outcome for outcome in outcomes if isinstance(outcome, CairnError)), None)
    return ([] if first else outcomes), first
