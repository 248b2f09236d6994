"""Carrying out what the catalog says: the loop, and one step for each phase that is not at rest.

A request only changes the catalog; all calls to nodes and front-ends are made here, for a request
that waits and for one whose caller (or whose control process) is gone alike. A step is named by
(volume, phase, epoch), runs once at a time, and ends in a transition that fails if the volume moved
on: so a step may be repeated, cut off or late without harm.

    creating    Create at each node (creating.py)          -> available, or error
    attaching   OpenVolume at the front-end                -> attached, or available with the reason, or error
    detaching   CloseVolume at the front-end               -> available; again while its clients take their time
    deleting    Delete at each node that is up             -> gone, with tombstones for the other nodes
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Protocol

import structlog

from blockstore.control import transitions
from blockstore.control.catalog import DRAINING, MOVES, VOLUMES, Catalog, nodes_of, tombstones_of
from blockstore.control.creating import Creating
from blockstore.control.floors import Floors
from blockstore.control.hydration import Hydrations
from blockstore.control.messages import Messages
from blockstore.control.metastore.interface import Compacted, Metastore
from blockstore.control.peers import Peers
from blockstore.control.presence import Presence
from blockstore.control.records import AttachmentState, FrontEnd, Node, Tombstone, Volume
from blockstore.control.roster import Roster
from blockstore.control.snapshot_catalog import PINS, SNAPSHOTS
from blockstore.control.steps import Steps, growth_key, newcomer_key
from blockstore.control.transitions import Phase, phase_of
from blockstore.domain import FrontEndId, NodeId, VolumeId
from blockstore.errors import (
    CairnError,
    Conflict,
    Corrupt,
    Fenced,
    NoSpace,
    NotFound,
    QuorumUnavailable,
)
from blockstore.units import Epoch

_log = structlog.get_logger(__name__)

#: A change here may be work.
_WATCHED: Final = (VOLUMES, SNAPSHOTS, PINS, DRAINING, MOVES)

#: What a transition raises where the volume was taken over, detached or deleted while a step ran:
#: what the step found does not count any more, and the next step carries on from what holds now.
MOVED_ON: Final = (Fenced, Conflict, NotFound)


class Work(Protocol):
    """More that is looked at in each pass: it starts steps and returns, and never waits for a peer."""

    async def reconcile(self, roster: Roster) -> None: ...


class Reconciler:
    """Drives every volume to where the catalog says that it should be."""

    def __init__(
        self,
        store: Metastore,
        catalog: Catalog,
        presence: Presence,
        floors: Floors,
        peers: Peers,
        *,
        hydrations: Hydrations,
        creating: Creating,
        interval_s: float,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._presence = presence
        self._floors = floors
        self._peers = peers
        self._hydrations = hydrations
        self._creating = creating
        self._interval_s = interval_s
        self._works: list[Work] = []
        self._roster = Roster(())
        self._changed = asyncio.Event()
        self.steps: Final = Steps()

    def add(self, work: Work) -> None:
        """Look at this, too, in each pass; before the loop runs."""
        self._works.append(work)

    async def run(self) -> None:
        """A pass at each change, and one each interval; until cancelled, or the metastore fails."""
        watching = [asyncio.ensure_future(self._watch(prefix)) for prefix in _WATCHED]
        try:
            while not (ended := [each for each in watching if each.done()]):
                self._changed.clear()
                await self._reconcile_or_wait()
                # Not wait_for: before Python 3.12 it swallows a cancellation that comes with the change.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._changed.wait()
            ended[0].result()
        finally:
            for each in watching:
                each.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await self.steps.cancel()

    async def _reconcile_or_wait(self) -> None:
        """A pass. A full disk is no reason to end: what could not be kept is kept in a later one."""
        try:
            await self.reconcile()
        except NoSpace as error:
            self.steps.tell("metastore", error)

    async def reconcile(self) -> None:
        """One pass: start what is to be done and not under way, and keep what was learned."""
        with self._store.as_of_now():
            await self._reconcile()

    async def _reconcile(self) -> None:
        roster, tombstones = await self.roster(), await self._catalog.tombstones()
        for volume in roster.active:
            if self._can_go_on(volume):
                self._start(volume)
        for tombstone in tombstones:
            if self._presence.is_up(tombstone.node):
                self._start_burial(tombstone)
        for work in self._works:
            with suppress(*MOVED_ON):  # What it looked at has changed meanwhile: that is another pass.
                await work.reconcile(roster)
        await self._floors.save()
        await self._close_channels()

    def look(self) -> None:
        """Make a pass now: something was heard that one waits for."""
        self._changed.set()

    async def settle(self, volume: Volume) -> None:
        """The step that the volume is in; returns when it has ended. Raises what it met."""
        if task := self._start(volume):
            await asyncio.shield(task)

    async def end_attempt(self, volume: VolumeId, end: Callable[[Volume], Volume]) -> None:
        """The transition that something under way ends in, unless the volume has moved on meanwhile."""
        with suppress(*MOVED_ON):
            await self._catalog.change_volume(volume, end)

    async def close_quietly(self, front_end: FrontEndId, volume: VolumeId, epoch: Epoch) -> None:
        """Tell a front-end what it will hear with its next heartbeat as well."""
        try:
            await self._peers.close_volume(await self._catalog.front_end(front_end), volume, epoch)
        except CairnError as error:
            _log.info("a front-end will hear later that a volume was taken away", volume=volume, error=str(error))

    async def show_size(self, volume: Volume) -> None:
        """Tell the front-end the new size, which it hears with its next heartbeat as well."""
        if volume.attachment is None:
            return
        try:
            front_end = await self._catalog.front_end(volume.attachment.front_end)
            await self._peers.resize_export(front_end, volume.id, volume.attachment.epoch, volume.size_bytes)
        except CairnError as error:
            _log.info("a front-end will hear later of a new size", volume=volume.id, error=str(error))

    # ---- which step, and when

    def _can_go_on(self, volume: Volume) -> bool:
        """Whoever has to do it is there, as far as that is known."""
        match phase_of(volume):
            case Phase.ATTACHING | Phase.DETACHING:
                assert volume.attachment is not None
                return self._presence.is_up(volume.attachment.front_end)
            case Phase.CREATING | Phase.DELETING:
                # Right after a start nobody was heard yet.
                nodes = nodes_of(volume)
                return not self._presence.settling_s() or all(self._presence.is_up(node) for node in nodes)
        return False

    def _start(self, volume: Volume) -> asyncio.Task[None] | None:
        phase = phase_of(volume)
        carry_out = self._steps().get(phase)
        if carry_out is None:
            return None
        key = (volume.id, phase, volume.attachment.epoch if volume.attachment else Epoch(0))
        return self.steps.start(key, volume.id, lambda: carry_out(volume))

    def _steps(self) -> dict[Phase, Callable[[Volume], Awaitable[None]]]:
        return {
            Phase.CREATING: self._create,
            Phase.ATTACHING: self._open,
            Phase.DETACHING: self._close,
            Phase.DELETING: self._delete,
        }

    # ---- the steps

    async def _create(self, volume: Volume) -> None:
        await self._creating.carry_out(volume.id)

    async def _delete(self, volume: Volume) -> None:
        await self._until_nothing_is_created(volume.id)
        nodes = {each.record.id: each.record for each in await self._catalog.nodes()}
        left = [each for each in tombstones_of(volume) if not self._presence.is_up(each.node)]
        outcomes = await asyncio.gather(
            *(self._peers.delete(nodes[each.node], each) for each in tombstones_of(volume) if each not in left),
            return_exceptions=True,
        )
        for error in outcomes:
            if error is not None:
                raise error
        await self._catalog.remove_volume(volume, [each for each in left if each.node in nodes])
        self._floors.forget(volume.id)
        self.steps.forget(volume.id)
        _log.info("volume deleted", volume=volume.id, replicas_left=len(left))

    async def _open(self, volume: Volume) -> None:
        attachment = volume.attachment
        assert attachment is not None
        front_end = await self._catalog.front_end(attachment.front_end)
        if front_end.instance != attachment.instance:
            await self.settle(
                await self._catalog.change_volume(volume.id, lambda now: transitions.reopen(now, front_end))
            )
            return
        try:
            await self._peers.open_volume(front_end, (await self.messages()).ticket(volume))
        except CairnError as error:
            await self._not_opened(volume.id, attachment.epoch, error)
            await self.close_quietly(front_end.id, volume.id, attachment.epoch)
            raise
        await self.end_attempt(volume.id, lambda now: transitions.opened(now, attachment.epoch))
        _log.info("volume attached", volume=volume.id, front_end=front_end.id, epoch=attachment.epoch)

    async def check_served(self, volume: Volume) -> None:
        """Of one that is attached already: its front-end serves it, and not only did when it was last heard.

        Raises QuorumUnavailable where it does not answer, and how it ended there.
        """
        attachment = volume.attachment
        if attachment is not None and attachment.state is AttachmentState.ATTACHED:
            front_end = await self._catalog.front_end(attachment.front_end)
            if front_end.instance == attachment.instance:
                await self._peers.open_volume(front_end, (await self.messages()).ticket(volume))

    async def _not_opened(self, volume: VolumeId, epoch: Epoch, error: CairnError) -> None:
        end = transitions.lost if isinstance(error, Corrupt) else transitions.give_up
        reason = str(error) if isinstance(error, Corrupt) else f"the last attach failed: {error}"
        await self.end_attempt(volume, lambda now: end(now, epoch, reason))

    async def _close(self, volume: Volume) -> None:
        attachment = volume.attachment
        assert attachment is not None
        if not await self._presence.hears(attachment.front_end):
            raise QuorumUnavailable(
                f"front-end {attachment.front_end} is down and cannot say that it has closed volume {volume.id}: "
                "start it, or detach with --force"
            )
        front_end = await self._catalog.front_end(attachment.front_end)
        if not await self._peers.close_volume(front_end, volume.id, attachment.epoch):
            return  # its clients take their time: the next pass asks again, and who detaches sees that it goes on
        await self.end_attempt(volume.id, lambda now: transitions.detached(now, attachment.epoch))
        _log.info("volume detached", volume=volume.id, front_end=front_end.id)

    def _start_burial(self, tombstone: Tombstone) -> None:
        async def bury() -> None:
            await self._until_nothing_is_created(tombstone.volume)
            node = (await self._catalog.node(tombstone.node)).record
            await self._peers.delete(node, tombstone)
            await self._catalog.remove_tombstone(tombstone)
            _log.info("a replica left over is deleted", node=tombstone.node, replica=tombstone.replica)

        self.steps.start((tombstone.replica, Phase.DELETING, Epoch(0)), tombstone.replica, bury)

    async def _until_nothing_is_created(self, volume: VolumeId) -> None:
        """A Create of one of its replicas that is under way may arrive after the Delete otherwise."""
        for key in ((volume, Phase.CREATING, Epoch(0)), newcomer_key(volume), growth_key(volume)):
            if creating := self.steps.running(key):
                await asyncio.wait([creating])

    # ---- what the steps rest on

    async def roster(self) -> Roster:
        """The volumes as they are now."""
        volumes = await self._catalog.volumes()
        if volumes is not self._roster.volumes:
            self._roster = Roster(volumes)
        return self._roster

    async def messages(self) -> Messages:
        """Records as messages, with nodes and front-ends as they are now."""
        nodes: dict[NodeId, Node] = {each.record.id: each.record for each in await self._catalog.nodes()}
        front_ends: dict[FrontEndId, FrontEnd] = {each.id: each for each in await self._catalog.front_ends()}
        return Messages(nodes, front_ends, self._presence, self._floors, await self._hydrations.view())

    async def _watch(self, prefix: str) -> None:
        """Wake the loop at each change under `prefix`."""
        while True:
            revision = (await self._store.list(prefix)).revision
            self._changed.set()
            with suppress(Compacted):
                async for _ in self._store.watch(prefix, revision):
                    self._changed.set()

    async def _close_channels(self) -> None:
        nodes = {each.record.address for each in await self._catalog.nodes()}
        await self._peers.keep_only(nodes | {each.address for each in await self._catalog.front_ends()})
