"""Fixing the content of new snapshots: one volume's by a seal, several volumes' behind a barrier.

    entered ── its volume is served (attached, or opened for maintenance) ── SealVolume ──> sealed
    several ── HoldWrites at all ── SealVolume at all ── ReleaseWrites at all, each held ──> all sealed

Several are snapshots of several volumes, or one of a volume of several segments: no one record fixes those.

A single seal is tried again until it is known to be done, always as one that may have been done
before: a control process that was killed in the middle finds the first one's generation. The instant of
a barrier is over when anything failed in it, or control was killed in it; it is tried again as another one, with seals
of its own name, a few times. Invariants: no seal of one try is ever taken for one of another; between two tries guests
go on; each try that failed leaves a pin to be taken away wherever a seal of it may have been made (design,
section 3, rule 8).
"""

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import structlog

from blockstore.control import snapshot_transitions, transitions
from blockstore.control.barrier import Barrier, Part
from blockstore.control.catalog import Catalog
from blockstore.control.clock import now_ms
from blockstore.control.maintenance import subject_of
from blockstore.control.messages import to_position
from blockstore.control.peers import Peers
from blockstore.control.placing import random_id
from blockstore.control.presence import Presence
from blockstore.control.reconcile import MOVED_ON, Reconciler
from blockstore.control.records import Volume
from blockstore.control.roster import Roster
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_records import Pin, Seal, Snapshot
from blockstore.control.snapshot_transitions import Phase, phase_of
from blockstore.control.transitions import place_of
from blockstore.domain import SnapshotId, VolumeId
from blockstore.errors import CairnError, Conflict, Fenced, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2

_log = structlog.get_logger(__name__)

#: What a front-end answers where the volume has moved or its members are away: another try may succeed.
_MAY_PASS: Final = (QuorumUnavailable, NotFound, Fenced)
#: And of a barrier: an earlier one may hold a volume still, or this one's hold was over when the seal came.
_MAY_PASS_HELD: Final = (*_MAY_PASS, Conflict)

#: Of a barrier: with the default limits they all fit into the time that a snapshot may take to be sealed.
_TRIES: Final = 3


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
        """Names of seals that this process chose, and has not sent yet."""
        self._unbegun: set[str] = set()
        """Barriers whose present try this process entered and has not begun. Any other was cut off in its middle."""
        self._since: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        """When the next try of a barrier may begin."""
        self._turn = asyncio.Lock()
        """Barriers one after the other: two that share volumes would break each other."""

    def expect(self, snapshots: Iterable[Snapshot]) -> None:
        """These are about to be entered in the catalog."""
        for each in snapshots:
            self._untried.add(each.seal_name)
            self._unbegun.add(each.barrier)

    def forget(self, snapshots: Iterable[Snapshot]) -> None:
        """They were not entered, or are sealed or in error."""
        for each in snapshots:
            self._untried.discard(each.seal_name)
            self._unbegun.discard(each.barrier)

    async def wait(self, snapshots: Sequence[SnapshotId]) -> tuple[Snapshot, ...]:
        """The snapshots once each is sealed or in error. Raises NotFound where one is gone."""
        await self._begin(snapshots)
        while True:
            changed = self._snapshots.next_change()
            found = [await self._snapshots.snapshot(each) for each in snapshots]
            if all(phase_of(each) is not Phase.SEALING for each in found):
                return tuple(found)
            await changed.wait()

    async def _begin(self, snapshots: Sequence[SnapshotId]) -> None:
        """Seal what was just entered of attached volumes, without waiting for a pass; all else is for that to decide.

        It runs in a request, which may be cut off anywhere: so it changes nothing itself.
        """
        with suppress(NotFound):
            group = [await self._snapshots.snapshot(each) for each in snapshots]
            volumes = [await self._catalog.volume(each.volume) for each in group]
            name, barrier = _group_of(group[0]), group[0].barrier
            if (
                all(phase_of(each) is Phase.SEALING for each in group)
                and all(volume.attachment and place_of(volume) for volume in volumes)
                and (not barrier or barrier in self._unbegun)
                and self._may_begin(name)
            ):
                self._start(name, group)

    async def reconcile(self, roster: Roster) -> None:
        """Start or give up what is to be sealed."""
        groups: dict[str, list[Snapshot]] = {}
        for snapshot in await self._snapshots.unfinished():
            if phase_of(snapshot) is Phase.SEALING:
                groups.setdefault(_group_of(snapshot), []).append(snapshot)
        self._forget_others(groups)
        volumes = roster.by_id
        for name, group in groups.items():
            # One that is so new that its volume was listed before it has its turn in the next pass.
            if not self._reconciler.steps.running(("seal", name)) and all(each.volume in volumes for each in group):
                await self._look_at(name, group, volumes)

    async def _look_at(self, name: str, group: list[Snapshot], volumes: Mapping[VolumeId, Volume]) -> None:
        if reason := self._hopeless(name, group, volumes):
            await self._fail(group, reason)
        elif group[0].barrier and group[0].barrier not in self._unbegun:
            self._reconciler.steps.start(("seal", name), name, lambda: self._end_interrupted(group))
        elif all(place_of(volumes[each.volume]) for each in group) and self._may_begin(name):
            self._start(name, group)

    def _start(self, name: str, group: list[Snapshot]) -> None:
        def seal() -> Awaitable[None]:
            return self._barrier(group) if group[0].barrier else self._seal_one(group[0])

        self._reconciler.steps.start(("seal", name), name, seal)

    def _may_begin(self, name: str) -> bool:
        return asyncio.get_running_loop().time() >= self._not_before.get(name, 0.0)

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
            self._not_before.pop(name, None)
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

    async def _barrier(self, listed: list[Snapshot]) -> None:
        async with self._turn:
            group = await self._now(listed)
            if not await self._is_sealing(group):
                return
            barrier = Barrier(self._peers, await self._parts(group), _name_of(group), self._hold_limit_s)
            # Whatever becomes of it, also of what is entered at its end: nobody begins it a second time.
            self._unbegun.discard(group[0].barrier)
            outcome = await barrier.attempt(self._seal)
        if outcome.error is None:
            await self._sealed(group, outcome.answers, [outcome.pause_us] * len(group))
            return
        reason = f"the volumes could not be sealed at one instant: {outcome.error}"
        await self._end_try(group, reason, last=not isinstance(outcome.error, _MAY_PASS_HELD))

    async def _end_interrupted(self, listed: list[Snapshot]) -> None:
        """Control was killed in it, or could not enter how it had ended. The instant is over."""
        group = await self._now(listed)
        if not await self._is_sealing(group):
            return
        served = [each for each in group if place_of(await self._catalog.volume(each.volume))]
        barrier = Barrier(self._peers, await self._parts(served), _name_of(group), self._hold_limit_s)
        if error := await barrier.release():
            _log.info("a front-end releases writes by itself", barrier=group[0].barrier, error=str(error))
        await self._end_try(group, "control was cut off before all volumes were sealed")

    async def _end_try(self, group: Sequence[Snapshot], reason: str, *, last: bool = False) -> None:
        """Begin another one with the next pass, unless it was the last."""
        tries = group[0].tries + 1
        if last or tries >= _TRIES:
            await self._fail(group, f"{reason}; it was tried {tries} times: create it again")
            return
        names = {each.id: SnapshotId(random_id("snap")) for each in group}
        await self._snapshots.change(
            [each.id for each in group],
            lambda now: snapshot_transitions.tried(now, names[now.id]),
            pins=self._pins_of(group),
        )
        self.forget(group)
        self._untried.update(names.values())
        self._unbegun.add(group[0].barrier)
        if tries > 1:  # it was no chance: a hold of somebody else ends meanwhile, and guests catch up
            self._not_before[group[0].barrier] = asyncio.get_running_loop().time() + self._hold_limit_s
        raise QuorumUnavailable(f"{reason}; it is tried once more")

    # ---- what both rest on

    async def _now(self, group: Sequence[Snapshot]) -> list[Snapshot]:
        return [await self._snapshots.snapshot(each.id) for each in group]

    async def _parts(self, group: Sequence[Snapshot]) -> list[Part]:
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
            parts.append(Part(snapshot, front_end, volume.id, place.epoch))
        return parts

    async def _is_sealing(self, group: Sequence[Snapshot]) -> bool:
        """Whether that is so still: the list that named them may have been read before another step ended."""
        return all([phase_of(await self._snapshots.snapshot(each.id)) is Phase.SEALING for each in group])

    async def _seal(self, part: Part) -> control_pb2.SealVolumeResponse:
        name = part.snapshot.seal_name
        again = name not in self._untried
        self._untried.discard(name)
        return await self._peers.seal_volume(part.front_end, part.volume, part.epoch, name, again=again)

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
        pins = self._pins_of(group)
        with suppress(*MOVED_ON):
            await self._snapshots.change(
                [each.id for each in group], lambda now: snapshot_transitions.given_up(now, reason), pins=pins
            )
            self.forget(group)
            _log.warning("snapshots could not be sealed", snapshots=[each.id for each in group], reason=reason)

    def _pins_of(self, group: Sequence[Snapshot]) -> list[Pin]:
        """To be taken away where this try may have made a seal."""
        tried = [each for each in group if each.seal_name not in self._untried]
        return [Pin(each.volume, each.seal_name, 0) for each in tried]


def _group_of(snapshot: Snapshot) -> str:
    """What names all that is sealed together with it."""
    return snapshot.barrier or snapshot.id


def _name_of(group: Sequence[Snapshot]) -> str:
    """Of the present try of its barrier."""
    return f"{group[0].barrier}-{group[0].tries}" if group[0].tries else group[0].barrier


def sealed_size(volume: Volume, answer: control_pb2.SealVolumeResponse) -> int:
    """Of the segments that were sealed: one that the volume got since is not in the snapshot."""
    return sum(each.size_bytes for each in volume.segments[: len(answer.segments) or 1])
